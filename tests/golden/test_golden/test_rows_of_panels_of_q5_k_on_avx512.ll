; rows for cpu:x86-64-v4, one row for each id, in interleaved16, made by q4jit
; output0 = w.rows(ids)

target triple = "x86_64-unknown-linux-gnu"

; The kernel's arguments, 8 bytes each.
%Slots = type {
  ptr,  ; 0 pool
  i64,  ; 1 m
  ptr,  ; 2 ids
  ptr,  ; 3 w
  ptr   ; 4 output0
}

; f16 as f32, exactly.
define internal float @load_f16_f32_align1(ptr %at) #1 {
entry:
  %f16 = load half, ptr %at, align 1
  %value = fpext half %f16 to float
  ret float %value
}

; Q5_K: the quant in the lowest bits of each lane, as a float.
define internal <16 x float> @quant_q5_k(<16 x i32> %bits0) #1 {
entry:
  ; vpermi2ps reads only the low five bits of a lane: it masks, subtracts and converts
  %quant = call <16 x float> @llvm.x86.avx512.vpermi2var.ps.512(<16 x float> <float 0.0, float 1.0, float 2.0, float 3.0, float 4.0, float 5.0, float 6.0, float 7.0, float 8.0, float 9.0, float 10.0, float 11.0, float 12.0, float 13.0, float 14.0, float 15.0>, <16 x i32> %bits0, <16 x float> <float 16.0, float 17.0, float 18.0, float 19.0, float 20.0, float 21.0, float 22.0, float 23.0, float 24.0, float 25.0, float 26.0, float 27.0, float 28.0, float 29.0, float 30.0, float 31.0>)
  ret <16 x float> %quant
}

; A column of a panel of Q5_K with K = 768 as floats.
define internal void @q5_k_k768_column(ptr noalias %row, i64 %column, ptr noalias %out) #0 {
entry:
  br label %block.head
block.head:
  %block = phi i64 [ 0, %entry ], [ %block.next, %sub_block.done ]
  %block.more = icmp slt i64 %block, 3
  br i1 %block.more, label %block.body, label %block.done
block.body:
  %slab_offset = mul i64 %block, 2880
  %slab_at = getelementptr i8, ptr %row, i64 %slab_offset
  %block_scale_at = getelementptr i16, ptr %slab_at, i64 %column
  %block_scale = call float @load_f16_f32_align1(ptr %block_scale_at)
  %block_scale_lane = insertelement <16 x float> poison, float %block_scale, i64 0
  %block_scale_lanes = shufflevector <16 x float> %block_scale_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %minimum_at = getelementptr i8, ptr %slab_at, i64 32
  %minimum_at.1 = getelementptr i16, ptr %minimum_at, i64 %column
  %minimum = call float @load_f16_f32_align1(ptr %minimum_at.1)
  %minimum_lane = insertelement <16 x float> poison, float %minimum, i64 0
  %minimum_lanes = shufflevector <16 x float> %minimum_lane, <16 x float> poison, <16 x i32> zeroinitializer
  br label %sub_block.head
sub_block.head:
  %sub_block = phi i64 [ 0, %block.body ], [ %sub_block.next, %chunk.done ]
  %sub_block.more = icmp slt i64 %sub_block, 8
  br i1 %sub_block.more, label %sub_block.body, label %sub_block.done
sub_block.body:
  %scale_offset = mul i64 %sub_block, 16
  %scale_offset.1 = add i64 %scale_offset, %column
  %scales_at = getelementptr i8, ptr %slab_at, i64 64
  %sub_scale_at = getelementptr i8, ptr %scales_at, i64 %scale_offset.1
  %scale_byte = load i8, ptr %sub_scale_at
  %scale_bits = zext i8 %scale_byte to i32
  %layer32 = trunc i64 %sub_block to i32
  %shift = mul i32 %layer32, 0
  %scale_bits.1 = lshr i32 %scale_bits, %shift
  %scale_byte.1 = trunc i32 %scale_bits.1 to i8
  %scale_int = sext i8 %scale_byte.1 to i32
  %scale_int_lane = insertelement <16 x i32> poison, i32 %scale_int, i64 0
  %scale_int_lanes = shufflevector <16 x i32> %scale_int_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %sub_scale = sitofp <16 x i32> %scale_int_lanes to <16 x float>
  %scale = fmul <16 x float> %block_scale_lanes, %sub_scale
  %minimum_offset = mul i64 %sub_block, 16
  %minimum_offset.1 = add i64 %minimum_offset, %column
  %minima_at = getelementptr i8, ptr %slab_at, i64 192
  %sub_minimum_at = getelementptr i8, ptr %minima_at, i64 %minimum_offset.1
  %minimum_byte = load i8, ptr %sub_minimum_at
  %minimum_bits = zext i8 %minimum_byte to i32
  %layer32.1 = trunc i64 %sub_block to i32
  %shift.1 = mul i32 %layer32.1, 0
  %minimum_bits.1 = lshr i32 %minimum_bits, %shift.1
  %minimum_byte.1 = trunc i32 %minimum_bits.1 to i8
  %minimum_int = sext i8 %minimum_byte.1 to i32
  %minimum_int_lane = insertelement <16 x i32> poison, i32 %minimum_int, i64 0
  %minimum_int_lanes = shufflevector <16 x i32> %minimum_int_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %sub_minimum = sitofp <16 x i32> %minimum_int_lanes to <16 x float>
  %minimum.1 = fmul <16 x float> %minimum_lanes, %sub_minimum
  %minimum.2 = fneg <16 x float> %minimum.1
  br label %chunk.head
chunk.head:
  %chunk = phi i64 [ 0, %sub_block.body ], [ %chunk.next, %chunk.body ]
  %chunk.more = icmp slt i64 %chunk, 2
  br i1 %chunk.more, label %chunk.body, label %chunk.done
chunk.body:
  %chunk_in_block = mul i64 %sub_block, 2
  %chunk_in_block.1 = add i64 %chunk_in_block, %chunk
  %run = udiv i64 %chunk_in_block.1, 2
  %in_run = urem i64 %chunk_in_block.1, 2
  %plane_byte = mul i64 %run, 16
  %layer32.2 = trunc i64 %in_run to i32
  %shift.2 = mul i32 %layer32.2, 4
  %quants0_at = getelementptr i8, ptr %slab_at, i64 320
  %chunk_offset = mul i64 %plane_byte, 16
  %chunk_offset.1 = mul i64 %column, 4
  %chunk_offset.2 = add i64 %chunk_offset, %chunk_offset.1
  %chunk_at = getelementptr i8, ptr %quants0_at, i64 %chunk_offset.2
  %word = load i32, ptr %chunk_at, align 4
  %words = insertelement <4 x i32> poison, i32 %word, i32 0
  %word_at = getelementptr i32, ptr %chunk_at, i64 16
  %word.1 = load i32, ptr %word_at, align 4
  %words.1 = insertelement <4 x i32> %words, i32 %word.1, i32 1
  %word_at.1 = getelementptr i32, ptr %chunk_at, i64 32
  %word.2 = load i32, ptr %word_at.1, align 4
  %words.2 = insertelement <4 x i32> %words.1, i32 %word.2, i32 2
  %word_at.2 = getelementptr i32, ptr %chunk_at, i64 48
  %word.3 = load i32, ptr %word_at.2, align 4
  %words.3 = insertelement <4 x i32> %words.2, i32 %word.3, i32 3
  %bytes = bitcast <4 x i32> %words.3 to <16 x i8>
  %bits = zext <16 x i8> %bytes to <16 x i32>
  %shift_lane = insertelement <16 x i32> poison, i32 %shift.2, i64 0
  %shift_lanes = shufflevector <16 x i32> %shift_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted = lshr <16 x i32> %bits, %shift_lanes
  %code = and <16 x i32> %shifted, splat (i32 15)
  %run.1 = udiv i64 %chunk_in_block.1, 2
  %in_run.1 = urem i64 %chunk_in_block.1, 2
  %plane_byte.1 = mul i64 %run.1, 4
  %layer32.3 = trunc i64 %in_run.1 to i32
  %shift.3 = mul i32 %layer32.3, 4
  %quants1_at = getelementptr i8, ptr %slab_at, i64 2368
  %chunk_offset.3 = mul i64 %plane_byte.1, 16
  %chunk_offset.4 = mul i64 %column, 4
  %chunk_offset.5 = add i64 %chunk_offset.3, %chunk_offset.4
  %chunk_at.1 = getelementptr i8, ptr %quants1_at, i64 %chunk_offset.5
  %word.4 = load i32, ptr %chunk_at.1, align 4
  %words.4 = insertelement <1 x i32> poison, i32 %word.4, i32 0
  %bytes.1 = bitcast <1 x i32> %words.4 to <4 x i8>
  %bytes.2 = shufflevector <4 x i8> %bytes.1, <4 x i8> poison, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 0, i32 1, i32 2, i32 3, i32 0, i32 1, i32 2, i32 3, i32 0, i32 1, i32 2, i32 3>
  %bits.1 = zext <16 x i8> %bytes.2 to <16 x i32>
  %shifted.1 = lshr <16 x i32> %bits.1, <i32 0, i32 0, i32 0, i32 0, i32 1, i32 1, i32 1, i32 1, i32 2, i32 2, i32 2, i32 2, i32 3, i32 3, i32 3, i32 3>  ; to each lane's bits
  %shift_lane.1 = insertelement <16 x i32> poison, i32 %shift.3, i64 0
  %shift_lanes.1 = shufflevector <16 x i32> %shift_lane.1, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.2 = lshr <16 x i32> %shifted.1, %shift_lanes.1
  %code.1 = and <16 x i32> %shifted.2, splat (i32 1)
  %code.2 = shl <16 x i32> %code.1, splat (i32 4)
  %code.3 = or <16 x i32> %code, %code.2
  %quant = call <16 x float> @quant_q5_k(<16 x i32> %code.3)
  %value = call <16 x float> @llvm.fma.v16f32(<16 x float> %scale, <16 x float> %quant, <16 x float> %minimum.2)
  %k = mul i64 %block, 256
  %k.1 = mul i64 %chunk_in_block.1, 16
  %k.2 = add i64 %k, %k.1
  %out_at = getelementptr float, ptr %out, i64 %k.2
  store <16 x float> %value, ptr %out_at, align 4
  %chunk.next = add i64 %chunk, 1
  br label %chunk.head, !llvm.loop !0
chunk.done:
  %sub_block.next = add i64 %sub_block, 1
  br label %sub_block.head
sub_block.done:
  %block.next = add i64 %block, 1
  br label %block.head
block.done:
  ret void
}

; One column of a panel for each id. The caller has checked the ids.
define internal void @q4jit_rows.rows(ptr %args, i64 %from, i64 %to) #0 {
entry:
  %ids_slot = getelementptr %Slots, ptr %args, i64 0, i32 2
  %ids = load ptr, ptr %ids_slot, align 8
  %w_slot = getelementptr %Slots, ptr %args, i64 0, i32 3
  %w = load ptr, ptr %w_slot, align 8
  %output0_slot = getelementptr %Slots, ptr %args, i64 0, i32 4
  %output0 = load ptr, ptr %output0_slot, align 8
  br label %row.head
row.head:
  %row = phi i64 [ %from, %entry ], [ %row.next, %row.body ]
  %row.more = icmp slt i64 %row, %to
  br i1 %row.more, label %row.body, label %row.done
row.body:
  %id_at = getelementptr i64, ptr %ids, i64 %row
  %id = load i64, ptr %id_at, align 8
  %panel = udiv i64 %id, 16
  %column = urem i64 %id, 16
  %w_offset = mul i64 %panel, 8640
  %w_at = getelementptr i8, ptr %w, i64 %w_offset
  %out_offset = mul i64 %row, 768
  %out_at = getelementptr float, ptr %output0, i64 %out_offset
  call void @q5_k_k768_column(ptr %w_at, i64 %column, ptr %out_at)
  %row.next = add i64 %row, 1
  br label %row.head
row.done:
  ret void
}

; Run task(args, from, to) over 0 … n, on the pool's threads if n is above a chunk.
; The pool's first field is the address of its function run(pool, task, args, n, chunk).
define internal void @parallel_for(ptr %pool, ptr %task, ptr %args, i64 %n, i64 %chunk) #0 {
entry:
  %alone = icmp eq ptr %pool, null
  %small = icmp sle i64 %n, %chunk
  %is_serial = or i1 %alone, %small
  br i1 %is_serial, label %serial, label %threads
serial:
  call void %task(ptr %args, i64 0, i64 %n)
  ret void
threads:
  %run = load ptr, ptr %pool, align 8
  call void %run(ptr %pool, ptr %task, ptr %args, i64 %n, i64 %chunk)
  ret void
}

; The kernel.
define void @q4jit_rows(ptr %args) #0 {
entry:
  %pool_slot = getelementptr %Slots, ptr %args, i64 0, i32 0
  %pool = load ptr, ptr %pool_slot, align 8
  %m_slot = getelementptr %Slots, ptr %args, i64 0, i32 1
  %m = load i64, ptr %m_slot, align 8
  call void @parallel_for(ptr %pool, ptr @q4jit_rows.rows, ptr %args, i64 %m, i64 10)
  ret void
}

declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x float> @llvm.x86.avx512.vpermi2var.ps.512(<16 x float>, <16 x i32>, <16 x float>)

attributes #0 = { nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }
attributes #1 = { alwaysinline nounwind }

!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}
