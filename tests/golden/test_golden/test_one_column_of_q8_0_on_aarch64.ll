; column for cpu:aarch64, 3 rows a tile, made by q4jit
; rows:
;   v0 = x
; 1 column, dot:
;   v1 = v0 @ w    Q8_0 [256, 1]
;   output0 = v1

target triple = "aarch64-unknown-linux-gnu"

; The kernel's arguments, 8 bytes each.
%Slots = type {
  ptr,  ; 0 pool
  i64,  ; 1 m
  ptr,  ; 2 x
  ptr,  ; 3 w
  ptr,  ; 4 output0
  ptr,  ; 5 prologue
  ptr   ; 6 row_factors
}

; Scale a row by a power of two that brings the exponent of its largest element into -40 … 96.
; There, sums of products with quants neither overflow nor become denormal. Most rows are there already.
; Sums of the row are later multiplied by the row factor, the inverse of that power.
define internal void @normalise(ptr %x, i64 %k, <16 x float> %largest, ptr %row_factor_at) #0 {
entry:
  %max = call float @llvm.vector.reduce.fmax.v16f32(<16 x float> %largest)
  ; a denormal is made normal first, so that its exponent can be read
  %tiny = fcmp olt float %max, 0x39B0000000000000  ; 2^-100
  %lifted = fmul float %max, 18446744073709551616.0  ; 2^64
  %normal = select i1 %tiny, float %lifted, float %max
  %bias = select i1 %tiny, i32 191, i32 127
  %bits = bitcast float %normal to i32
  %biased = lshr i32 %bits, 23  ; past the mantissa
  %exponent = sub i32 %biased, %bias
  %at_least = call i32 @llvm.smax.i32(i32 %exponent, i32 -40)
  %wanted = call i32 @llvm.smin.i32(i32 %at_least, i32 96)
  %shift = sub i32 %wanted, %exponent
  %zero = fcmp oeq float %max, 0.0
  %inside = icmp eq i32 %shift, 0
  %nothing = or i1 %zero, %inside
  br i1 %nothing, label %keep, label %rescale
keep:
  store float 1.0, ptr %row_factor_at, align 4
  ret void
rescale:
  %up_biased = add i32 %shift, 127
  %up_bits = shl i32 %up_biased, 23
  %up = bitcast i32 %up_bits to float
  %down_biased = sub i32 127, %shift
  %down_bits = shl i32 %down_biased, 23
  %down = bitcast i32 %down_bits to float
  store float %down, ptr %row_factor_at, align 4
  %up_lane = insertelement <16 x float> poison, float %up, i64 0
  %up_lanes = shufflevector <16 x float> %up_lane, <16 x float> poison, <16 x i32> zeroinitializer
  br label %column.head
column.head:
  %column = phi i64 [ 0, %rescale ], [ %column.next, %column.body ]
  %column.more = icmp slt i64 %column, %k
  br i1 %column.more, label %column.body, label %column.done
column.body:
  %x_at = getelementptr float, ptr %x, i64 %column
  %x.1 = load <16 x float>, ptr %x_at, align 4
  %scaled = fmul <16 x float> %x.1, %up_lanes
  store <16 x float> %scaled, ptr %x_at, align 4
  %column.next = add i64 %column, 16
  br label %column.head
column.done:
  ret void
}

; One row before the products: x, and the row's values that the columns phase needs.
define internal void @q4jit_column.row(ptr %args, i64 %row) #0 {
entry:
  %prologue_slot = getelementptr %Slots, ptr %args, i64 0, i32 5
  %prologue = load ptr, ptr %prologue_slot, align 8
  %x_slot = getelementptr %Slots, ptr %args, i64 0, i32 2
  %x = load ptr, ptr %x_slot, align 8
  %row_factors_slot = getelementptr %Slots, ptr %args, i64 0, i32 6
  %row_factors = load ptr, ptr %row_factors_slot, align 8
  %prologue_offset = mul i64 %row, 256
  %prologue_row_at = getelementptr float, ptr %prologue, i64 %prologue_offset
  ; x of the products, and its largest finite magnitude
  br label %column.head
column.head:
  %column = phi i64 [ 0, %entry ], [ %column.next, %column.body ]
  %largest.column = phi <16 x float> [ zeroinitializer, %entry ], [ %largest, %column.body ]
  %column.more = icmp slt i64 %column, 256
  br i1 %column.more, label %column.body, label %column.done
column.body:
  %x_offset = mul i64 %row, 256
  %x_row_at = getelementptr float, ptr %x, i64 %x_offset
  %x_at = getelementptr float, ptr %x_row_at, i64 %column
  %x_columns = load <16 x float>, ptr %x_at, align 4
  %prologue_at = getelementptr float, ptr %prologue_row_at, i64 %column
  store <16 x float> %x_columns, ptr %prologue_at, align 4
  %magnitude = call <16 x float> @llvm.fabs.v16f32(<16 x float> %x_columns)
  %finite = fcmp olt <16 x float> %magnitude, splat (float 0x7FF0000000000000)  ; Inf
  %larger = fcmp ogt <16 x float> %magnitude, %largest.column
  %both = and <16 x i1> %finite, %larger
  %largest = select <16 x i1> %both, <16 x float> %magnitude, <16 x float> %largest.column
  %column.next = add i64 %column, 16
  br label %column.head
column.done:
  %row_factor_at = getelementptr float, ptr %row_factors, i64 %row
  call void @normalise(ptr %prologue_row_at, i64 256, <16 x float> %largest.column, ptr %row_factor_at)
  ret void
}

define internal void @q4jit_column.rows(ptr %args, i64 %from, i64 %to) #0 {
entry:
  br label %row.head
row.head:
  %row = phi i64 [ %from, %entry ], [ %row.next, %row.body ]
  %row.more = icmp slt i64 %row, %to
  br i1 %row.more, label %row.body, label %row.done
row.body:
  call void @q4jit_column.row(ptr %args, i64 %row)
  %row.next = add i64 %row, 1
  br label %row.head
row.done:
  ret void
}

; f16 as f32, exactly.
define internal float @load_f16_f32_align1(ptr %at) #1 {
entry:
  %f16 = load half, ptr %at, align 1
  %value = fpext half %f16 to float
  ret float %value
}

; Q8_0: the quant in the lowest bits of each lane, as a float.
define internal <16 x float> @quant_q8_0(<16 x i32> %bits0) #1 {
entry:
  %top = shl <16 x i32> %bits0, splat (i32 24)
  %int = ashr <16 x i32> %top, splat (i32 24)  ; the lowest byte with its sign
  %quant = sitofp <16 x i32> %int to <16 x float>
  ret <16 x float> %quant
}

; x times one column of Q8_0 with K = 256, 16 elements at a time.
define internal float @q8_0_k256_dot(ptr noalias %x, ptr noalias %row) #0 {
entry:
  br label %block.head
block.head:
  %block = phi i64 [ 0, %entry ], [ %block.next, %chunk.done ]
  %total.block = phi <16 x float> [ zeroinitializer, %entry ], [ %total, %chunk.done ]
  %block.more = icmp slt i64 %block, 8
  br i1 %block.more, label %block.body, label %block.done
block.body:
  %block_offset = mul i64 %block, 34
  %block_at = getelementptr i8, ptr %row, i64 %block_offset
  %block_scale = call float @load_f16_f32_align1(ptr %block_at)
  %block_scale_lane = insertelement <16 x float> poison, float %block_scale, i64 0
  %block_scale_lanes = shufflevector <16 x float> %block_scale_lane, <16 x float> poison, <16 x i32> zeroinitializer
  br label %chunk.head
chunk.head:
  %chunk = phi i64 [ 0, %block.body ], [ %chunk.next, %chunk.body ]
  %part.chunk = phi <16 x float> [ zeroinitializer, %block.body ], [ %part, %chunk.body ]
  %chunk.more = icmp slt i64 %chunk, 2
  br i1 %chunk.more, label %chunk.body, label %chunk.done
chunk.body:
  %in_width = urem i64 %chunk, 2
  %plane_byte = mul i64 %in_width, 16
  %chunk_offset = add i64 %plane_byte, 2
  %chunk_at = getelementptr i8, ptr %block_at, i64 %chunk_offset
  %bytes = load <16 x i8>, ptr %chunk_at, align 1
  %bits = zext <16 x i8> %bytes to <16 x i32>
  %quant = call <16 x float> @quant_q8_0(<16 x i32> %bits)
  %k = mul i64 %block, 32
  %k.1 = mul i64 %chunk, 16
  %k.2 = add i64 %k, %k.1
  %x_at = getelementptr float, ptr %x, i64 %k.2
  %x.1 = load <16 x float>, ptr %x_at, align 4
  %part = call <16 x float> @llvm.fma.v16f32(<16 x float> %x.1, <16 x float> %quant, <16 x float> %part.chunk)
  %chunk.next = add i64 %chunk, 1
  br label %chunk.head, !llvm.loop !0
chunk.done:
  %total = call <16 x float> @llvm.fma.v16f32(<16 x float> %block_scale_lanes, <16 x float> %part.chunk, <16 x float> %total.block)
  %block.next = add i64 %block, 1
  br label %block.head
block.done:
  %sum = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %total.block)
  ret float %sum
}

; 1 of 1 column for rows %first … %end: 1 product and the epilogue.
define internal void @q4jit_column.section0(ptr %args, i64 %task, i64 %first, i64 %end) #0 {
entry:
  %prologue_slot = getelementptr %Slots, ptr %args, i64 0, i32 5
  %prologue = load ptr, ptr %prologue_slot, align 8
  %w_slot = getelementptr %Slots, ptr %args, i64 0, i32 3
  %w = load ptr, ptr %w_slot, align 8
  %row_factors_slot = getelementptr %Slots, ptr %args, i64 0, i32 6
  %row_factors = load ptr, ptr %row_factors_slot, align 8
  %output0_slot = getelementptr %Slots, ptr %args, i64 0, i32 4
  %output0 = load ptr, ptr %output0_slot, align 8
  %start = mul i64 %task, 16
  %stop = add i64 %start, 16
  %over = icmp sgt i64 %stop, 1
  %stop.1 = select i1 %over, i64 1, i64 %stop
  br label %column.head
column.head:
  %column = phi i64 [ %start, %entry ], [ %column.next, %row.done ]
  %column.more = icmp slt i64 %column, %stop.1
  br i1 %column.more, label %column.body, label %column.done
column.body:
  br label %row.head
row.head:
  %row = phi i64 [ %first, %column.body ], [ %row.next, %row.body ]
  %row.more = icmp slt i64 %row, %end
  br i1 %row.more, label %row.body, label %row.done
row.body:
  %x_offset = mul i64 %row, 256
  %x_at = getelementptr float, ptr %prologue, i64 %x_offset
  %w_offset = mul i64 %column, 272
  %w_at = getelementptr i8, ptr %w, i64 %w_offset
  %dot = call float @q8_0_k256_dot(ptr %x_at, ptr %w_at)
  %row_factor_at = getelementptr float, ptr %row_factors, i64 %row
  %row_factor = load float, ptr %row_factor_at, align 4
  %product = fmul float %dot, %row_factor
  %output0_row_at = getelementptr float, ptr %output0, i64 %row
  %output0_at = getelementptr float, ptr %output0_row_at, i64 %column
  store float %product, ptr %output0_at, align 4
  %row.next = add i64 %row, 1
  br label %row.head
row.done:
  %column.next = add i64 %column, 1
  br label %column.head
column.done:
  ret void
}

; Tasks are numbered through all sections.
define internal void @q4jit_column.columns(ptr %args, i64 %from, i64 %to) #0 {
entry:
  %m_slot = getelementptr %Slots, ptr %args, i64 0, i32 1
  %m = load i64, ptr %m_slot, align 8
  br label %number.head
number.head:
  %number = phi i64 [ %from, %entry ], [ %number.next, %next ]
  %number.more = icmp slt i64 %number, %to
  br i1 %number.more, label %number.body, label %number.done
number.body:
  %below = icmp slt i64 %number, 1
  br i1 %below, label %section0, label %after0
section0:
  call void @q4jit_column.section0(ptr %args, i64 %number, i64 0, i64 %m)
  br label %next
after0:
  br label %next
next:
  %number.next = add i64 %number, 1
  br label %number.head
number.done:
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
define void @q4jit_column(ptr %args) #0 {
entry:
  %pool_slot = getelementptr %Slots, ptr %args, i64 0, i32 0
  %pool = load ptr, ptr %pool_slot, align 8
  %m_slot = getelementptr %Slots, ptr %args, i64 0, i32 1
  %m = load i64, ptr %m_slot, align 8
  call void @parallel_for(ptr %pool, ptr @q4jit_column.rows, ptr %args, i64 %m, i64 32)
  call void @parallel_for(ptr %pool, ptr @q4jit_column.columns, ptr %args, i64 1, i64 7)
  ret void
}

declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare i32 @llvm.smax.i32(i32, i32)
declare i32 @llvm.smin.i32(i32, i32)

attributes #0 = { nounwind "prefer-vector-width"="128" "min-legal-vector-width"="128" }
attributes #1 = { alwaysinline nounwind }

!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}
