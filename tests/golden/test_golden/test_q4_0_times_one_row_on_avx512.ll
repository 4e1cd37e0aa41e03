; product for cpu:x86-64-v4, M = 1, made by q4jit
; rows:
;   v0 = x
; 64 columns:
;   v1 = v0 @ w    Q4_0 [4096, 64]
;   output0 = v1

target triple = "x86_64-unknown-linux-gnu"

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
define internal void @q4jit_product.row(ptr %args, i64 %row) #0 {
entry:
  %prologue_slot = getelementptr %Slots, ptr %args, i64 0, i32 5
  %prologue = load ptr, ptr %prologue_slot, align 8
  %x_slot = getelementptr %Slots, ptr %args, i64 0, i32 2
  %x = load ptr, ptr %x_slot, align 8
  %row_factors_slot = getelementptr %Slots, ptr %args, i64 0, i32 6
  %row_factors = load ptr, ptr %row_factors_slot, align 8
  %prologue_offset = mul i64 %row, 4096
  %prologue_row_at = getelementptr float, ptr %prologue, i64 %prologue_offset
  ; x of the products, and its largest finite magnitude
  br label %column.head
column.head:
  %column = phi i64 [ 0, %entry ], [ %column.next, %column.body ]
  %largest.column = phi <16 x float> [ zeroinitializer, %entry ], [ %largest, %column.body ]
  %column.more = icmp slt i64 %column, 4096
  br i1 %column.more, label %column.body, label %column.done
column.body:
  %x_at = getelementptr float, ptr %x, i64 %column
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
  call void @normalise(ptr %prologue_row_at, i64 4096, <16 x float> %largest.column, ptr %row_factor_at)
  ret void
}

define internal void @q4jit_product.rows(ptr %args, i64 %from, i64 %to) #0 {
entry:
  br label %row.head
row.head:
  %row = phi i64 [ %from, %entry ], [ %row.next, %row.body ]
  %row.more = icmp slt i64 %row, %to
  br i1 %row.more, label %row.body, label %row.done
row.body:
  call void @q4jit_product.row(ptr %args, i64 %row)
  %row.next = add i64 %row, 1
  br label %row.head
row.done:
  ret void
}

; sum + x·weights, one x for all 16 columns.
define internal <16 x float> @multiply_add(<16 x float> %sum, ptr %x_at, <16 x float> %weights) #1 {
entry:
  %x = load float, ptr %x_at, align 4
  %x_lane = insertelement <16 x float> poison, float %x, i64 0
  %x_lanes = shufflevector <16 x float> %x_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %total = call <16 x float> @llvm.fma.v16f32(<16 x float> %x_lanes, <16 x float> %weights, <16 x float> %sum)
  ret <16 x float> %total
}

; f16 as f32, exactly.
define internal <16 x float> @load_f16_v16f32(ptr %at) #1 {
entry:
  %f16 = load <16 x half>, ptr %at, align 2
  %value = fpext <16 x half> %f16 to <16 x float>
  ret <16 x float> %value
}

; Q4_0: the quant in the lowest bits of each lane, as a float.
define internal <16 x float> @quant_q4_0(<16 x i32> %bits0) #1 {
entry:
  ; vpermps reads only the low four bits of a lane: it masks, subtracts and converts
  %quant = call <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float> <float -8.0, float -7.0, float -6.0, float -5.0, float -4.0, float -3.0, float -2.0, float -1.0, float 0.0, float 1.0, float 2.0, float 3.0, float 4.0, float 5.0, float 6.0, float 7.0>, <16 x i32> %bits0)
  ret <16 x float> %quant
}

; Add to a total, and what rounding takes from it to the total after it.
define internal void @add_to_long(<16 x float> %part, ptr %sum) noinline #0 {
entry:
  %lost_at = getelementptr <16 x float>, ptr %sum, i64 1
  %total = load <16 x float>, ptr %sum, align 64
  %lost = load <16 x float>, ptr %lost_at, align 64
  %new = fadd <16 x float> %total, %part
  %added = fsub <16 x float> %new, %total
  %before = fsub <16 x float> %new, %added
  %lost_of_total = fsub <16 x float> %total, %before
  %lost_of_part = fsub <16 x float> %part, %added
  %lost_now = fadd <16 x float> %lost_of_total, %lost_of_part
  %lost.1 = fadd <16 x float> %lost, %lost_now
  store <16 x float> %new, ptr %sum, align 64
  store <16 x float> %lost.1, ptr %lost_at, align 64
  ret void
}

; 16 columns of Q4_0, one a lane, times 1 row of x; K = 4096.
; 64 slabs of 576 bytes: 2 blocks of 32 elements; rows of x are 4096 floats apart.
define internal void @q4_0_k4096_rows1(ptr noalias %x, ptr noalias %w, ptr noalias %tile) #0 {
entry:
  %long_sums = alloca [1 x [2 x <16 x float>]], align 64
  store [2 x <16 x float>] zeroinitializer, ptr %long_sums, align 64
  br label %stretch.head
stretch.head:
  %stretch = phi i64 [ 0, %entry ], [ %stretch.next, %slab.done ]
  %stretch.more = icmp slt i64 %stretch, 64
  br i1 %stretch.more, label %stretch.body, label %stretch.done
stretch.body:
  %stretch_end = add i64 %stretch, 32
  br label %slab.head
slab.head:
  %slab = phi i64 [ %stretch, %stretch.body ], [ %slab.next, %block.done ]
  %total0.slab = phi <16 x float> [ zeroinitializer, %stretch.body ], [ %total0.block, %block.done ]
  %slab.more = icmp slt i64 %slab, %stretch_end
  br i1 %slab.more, label %slab.body, label %slab.done
slab.body:
  %slab_offset = mul i64 %slab, 576
  %slab_at = getelementptr i8, ptr %w, i64 %slab_offset
  br label %block.head
block.head:
  %block = phi i64 [ 0, %slab.body ], [ %block.next, %chunk.done ]
  %total0.block = phi <16 x float> [ %total0.slab, %slab.body ], [ %total0, %chunk.done ]
  %block.more = icmp slt i64 %block, 2
  br i1 %block.more, label %block.body, label %block.done
block.body:
  %block_scale_offset = mul i64 %block, 32
  %block_scale_at = getelementptr i8, ptr %slab_at, i64 %block_scale_offset
  %block_scale = call <16 x float> @load_f16_v16f32(ptr %block_scale_at)
  ; prefetch 8192 bytes ahead
  br label %line.head
line.head:
  %line = phi i64 [ 0, %block.body ], [ %line.next, %line.body ]
  %line.more = icmp slt i64 %line, 5
  br i1 %line.more, label %line.body, label %line.done
line.body:
  %ahead = mul i64 %block, 288
  %ahead.1 = mul i64 %line, 64
  %ahead.2 = add i64 %ahead, %ahead.1
  %ahead.3 = add i64 %ahead.2, 8192
  %ahead_at = getelementptr i8, ptr %slab_at, i64 %ahead.3
  call void @llvm.prefetch.p0(ptr %ahead_at, i32 0, i32 2, i32 1)  ; read, second level
  %line.next = add i64 %line, 1
  br label %line.head, !llvm.loop !0
line.done:
  %k = mul i64 %slab, 64
  %k.1 = mul i64 %block, 32
  %k.2 = add i64 %k, %k.1
  br label %chunk.head
chunk.head:
  %chunk = phi i64 [ 0, %line.done ], [ %chunk.next, %word.done ]
  %part0.0.chunk = phi <16 x float> [ zeroinitializer, %line.done ], [ %part0.0.word, %word.done ]
  %part0.1.chunk = phi <16 x float> [ zeroinitializer, %line.done ], [ %part0.1.word, %word.done ]
  %part0.2.chunk = phi <16 x float> [ zeroinitializer, %line.done ], [ %part0.2.word, %word.done ]
  %part0.3.chunk = phi <16 x float> [ zeroinitializer, %line.done ], [ %part0.3.word, %word.done ]
  %chunk.more = icmp slt i64 %chunk, 2
  br i1 %chunk.more, label %chunk.body, label %chunk.done
chunk.body:
  %layer32 = trunc i64 %chunk to i32
  %shift = mul i32 %layer32, 4
  %quants0_offset = mul i64 %block, 256
  %quants0_offset.1 = add i64 %quants0_offset, 64
  %quants0_at = getelementptr i8, ptr %slab_at, i64 %quants0_offset.1
  br label %word.head
word.head:
  %word = phi i64 [ 0, %chunk.body ], [ %word.next, %word.body ]
  %part0.0.word = phi <16 x float> [ %part0.0.chunk, %chunk.body ], [ %part0.0, %word.body ]
  %part0.1.word = phi <16 x float> [ %part0.1.chunk, %chunk.body ], [ %part0.1, %word.body ]
  %part0.2.word = phi <16 x float> [ %part0.2.chunk, %chunk.body ], [ %part0.2, %word.body ]
  %part0.3.word = phi <16 x float> [ %part0.3.chunk, %chunk.body ], [ %part0.3, %word.body ]
  %word.more = icmp slt i64 %word, 4
  br i1 %word.more, label %word.body, label %word.done
word.body:
  %k.3 = mul i64 %chunk, 16
  %k.4 = mul i64 %word, 4
  %k.5 = add i64 %k.2, %k.3
  %k.6 = add i64 %k.5, %k.4
  %word_at = getelementptr <16 x i32>, ptr %quants0_at, i64 %word
  %word_bits = load <16 x i32>, ptr %word_at, align 32
  %shift_lane = insertelement <16 x i32> poison, i32 %shift, i64 0
  %shift_lanes = shufflevector <16 x i32> %shift_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted = lshr <16 x i32> %word_bits, %shift_lanes
  %quant0 = call <16 x float> @quant_q4_0(<16 x i32> %shifted)
  %shifted.1 = lshr <16 x i32> %shifted, splat (i32 8)
  %quant1 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.1)
  %shifted.2 = lshr <16 x i32> %shifted, splat (i32 16)
  %quant2 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.2)
  %shifted.3 = lshr <16 x i32> %shifted, splat (i32 24)
  %quant3 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.3)
  ; x[k … k+3] times four weights of every column
  %x_at = getelementptr float, ptr %x, i64 %k.6
  %part0.0 = call <16 x float> @multiply_add(<16 x float> %part0.0.word, ptr %x_at, <16 x float> %quant0)
  %x_offset = add i64 %k.6, 1
  %x_at.1 = getelementptr float, ptr %x, i64 %x_offset
  %part0.1 = call <16 x float> @multiply_add(<16 x float> %part0.1.word, ptr %x_at.1, <16 x float> %quant1)
  %x_offset.1 = add i64 %k.6, 2
  %x_at.2 = getelementptr float, ptr %x, i64 %x_offset.1
  %part0.2 = call <16 x float> @multiply_add(<16 x float> %part0.2.word, ptr %x_at.2, <16 x float> %quant2)
  %x_offset.2 = add i64 %k.6, 3
  %x_at.3 = getelementptr float, ptr %x, i64 %x_offset.2
  %part0.3 = call <16 x float> @multiply_add(<16 x float> %part0.3.word, ptr %x_at.3, <16 x float> %quant3)
  %word.next = add i64 %word, 1
  br label %word.head, !llvm.loop !0
word.done:
  %chunk.next = add i64 %chunk, 1
  br label %chunk.head, !llvm.loop !0
chunk.done:
  ; one sum per sub-block: short sums keep the rounding error small
  %part = fadd <16 x float> %part0.0.chunk, %part0.1.chunk
  %part.1 = fadd <16 x float> %part, %part0.2.chunk
  %part.2 = fadd <16 x float> %part.1, %part0.3.chunk
  %total0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %block_scale, <16 x float> %part.2, <16 x float> %total0.block)
  %block.next = add i64 %block, 1
  br label %block.head, !llvm.loop !0
block.done:
  %slab.next = add i64 %slab, 1
  br label %slab.head
slab.done:
  ; the stretch's sums are added with what rounding takes from them
  call void @add_to_long(<16 x float> %total0.slab, ptr %long_sums)
  %stretch.next = add i64 %stretch, 32
  br label %stretch.head
stretch.done:
  %total = load <16 x float>, ptr %long_sums, align 64
  %lost_at = getelementptr <16 x float>, ptr %long_sums, i64 1
  %lost = load <16 x float>, ptr %lost_at, align 64
  %magnitude = call <16 x float> @llvm.fabs.v16f32(<16 x float> %lost)
  %finite = fcmp olt <16 x float> %magnitude, splat (float 0x7FF0000000000000)  ; not Inf − Inf
  %kept = select <16 x i1> %finite, <16 x float> %lost, <16 x float> zeroinitializer
  %total.1 = fadd <16 x float> %total, %kept
  store <16 x float> %total.1, ptr %tile, align 64
  ret void
}

; 16 of 64 columns for rows %first … %end: 1 product and the epilogue.
define internal void @q4jit_product.section0(ptr %args, i64 %task, i64 %first, i64 %end) #0 {
entry:
  %w_slot = getelementptr %Slots, ptr %args, i64 0, i32 3
  %w = load ptr, ptr %w_slot, align 8
  %prologue_slot = getelementptr %Slots, ptr %args, i64 0, i32 5
  %prologue = load ptr, ptr %prologue_slot, align 8
  %row_factors_slot = getelementptr %Slots, ptr %args, i64 0, i32 6
  %row_factors = load ptr, ptr %row_factors_slot, align 8
  %output0_slot = getelementptr %Slots, ptr %args, i64 0, i32 4
  %output0 = load ptr, ptr %output0_slot, align 8
  %tile = alloca [1 x <16 x float>], align 64
  %w_offset = mul i64 %task, 36864
  %w_at = getelementptr i8, ptr %w, i64 %w_offset
  br label %tile_row.head
tile_row.head:
  %tile_row = phi i64 [ %first, %entry ], [ %tile_row.next, %tile_row.body ]
  %tile_row.more = icmp slt i64 %tile_row, %end
  br i1 %tile_row.more, label %tile_row.body, label %tile_row.done
tile_row.body:
  %x_offset = mul i64 %tile_row, 4096
  %x_at = getelementptr float, ptr %prologue, i64 %x_offset
  call void @q4_0_k4096_rows1(ptr %x_at, ptr %w_at, ptr %tile)
  %sums = load <16 x float>, ptr %tile, align 64
  %column = mul i64 %task, 16
  %row_factor_at = getelementptr float, ptr %row_factors, i64 %tile_row
  %row_factor = load float, ptr %row_factor_at, align 4
  %row_factor_lane = insertelement <16 x float> poison, float %row_factor, i64 0
  %row_factor_lanes = shufflevector <16 x float> %row_factor_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %product = fmul <16 x float> %sums, %row_factor_lanes
  %output0_offset = mul i64 %tile_row, 64
  %output0_row_at = getelementptr float, ptr %output0, i64 %output0_offset
  %output0_at = getelementptr float, ptr %output0_row_at, i64 %column
  store <16 x float> %product, ptr %output0_at, align 4
  %tile_row.next = add i64 %tile_row, 1
  br label %tile_row.head
tile_row.done:
  ret void
}

; Tasks are numbered through all sections.
define internal void @q4jit_product.columns(ptr %args, i64 %from, i64 %to) #0 {
entry:
  %m_slot = getelementptr %Slots, ptr %args, i64 0, i32 1
  %m = load i64, ptr %m_slot, align 8
  br label %number.head
number.head:
  %number = phi i64 [ %from, %entry ], [ %number.next, %next ]
  %number.more = icmp slt i64 %number, %to
  br i1 %number.more, label %number.body, label %number.done
number.body:
  %below = icmp slt i64 %number, 4
  br i1 %below, label %section0, label %after0
section0:
  call void @q4jit_product.section0(ptr %args, i64 %number, i64 0, i64 %m)
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
define void @q4jit_product(ptr %args) #0 {
entry:
  %pool_slot = getelementptr %Slots, ptr %args, i64 0, i32 0
  %pool = load ptr, ptr %pool_slot, align 8
  %m_slot = getelementptr %Slots, ptr %args, i64 0, i32 1
  %m = load i64, ptr %m_slot, align 8
  call void @parallel_for(ptr %pool, ptr @q4jit_product.rows, ptr %args, i64 %m, i64 2)
  call void @parallel_for(ptr %pool, ptr @q4jit_product.columns, ptr %args, i64 4, i64 1)
  ret void
}

declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare i32 @llvm.smax.i32(i32, i32)
declare i32 @llvm.smin.i32(i32, i32)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

attributes #0 = { nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }
attributes #1 = { alwaysinline nounwind }

!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}
