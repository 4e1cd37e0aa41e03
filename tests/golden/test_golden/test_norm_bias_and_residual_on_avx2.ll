; layer for cpu:x86-64-v3, M = 1, made by q4jit
; rows:
;   v12 = x / sqrt(sum(x * x) / 64 + 1e-05) * gain
; 40 columns:
;   v13 = v12 @ w    F32 [64, 40]
;   output0 = v13 + bias + residual

target triple = "x86_64-unknown-linux-gnu"

; The kernel's arguments, 8 bytes each.
%Slots = type {
  ptr,  ; 0 pool
  i64,  ; 1 m
  ptr,  ; 2 x
  ptr,  ; 3 gain
  ptr,  ; 4 bias
  ptr,  ; 5 residual
  ptr,  ; 6 w
  ptr,  ; 7 output0
  ptr,  ; 8 prologue
  ptr   ; 9 row_factors
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
define internal void @q4jit_layer.row(ptr %args, i64 %row) #0 {
entry:
  %x_slot = getelementptr %Slots, ptr %args, i64 0, i32 2
  %x = load ptr, ptr %x_slot, align 8
  %prologue_slot = getelementptr %Slots, ptr %args, i64 0, i32 8
  %prologue = load ptr, ptr %prologue_slot, align 8
  %gain_slot = getelementptr %Slots, ptr %args, i64 0, i32 3
  %gain = load ptr, ptr %gain_slot, align 8
  %row_factors_slot = getelementptr %Slots, ptr %args, i64 0, i32 9
  %row_factors = load ptr, ptr %row_factors_slot, align 8
  ; sum of 64 columns
  br label %vector.head
vector.head:
  %vector = phi i64 [ 0, %entry ], [ %vector.next, %vector.body ]
  %sum.vector = phi <16 x float> [ zeroinitializer, %entry ], [ %sum, %vector.body ]
  %vector.more = icmp slt i64 %vector, 4
  br i1 %vector.more, label %vector.body, label %vector.done
vector.body:
  %column = mul i64 %vector, 16
  %x_at = getelementptr float, ptr %x, i64 %column
  %x_columns = load <16 x float>, ptr %x_at, align 4
  %mul = fmul <16 x float> %x_columns, %x_columns
  %sum = fadd <16 x float> %sum.vector, %mul
  %vector.next = add i64 %vector, 1
  br label %vector.head
vector.done:
  %sum.1 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %sum.vector)
  %prologue_offset = mul i64 %row, 64
  %prologue_row_at = getelementptr float, ptr %prologue, i64 %prologue_offset
  %div = fdiv float %sum.1, 64.0
  %add = fadd float %div, 0x3EE4F8B580000000
  %sqrt = call float @llvm.sqrt.f32(float %add)
  ; x of the products, and its largest finite magnitude
  br label %column.1.head
column.1.head:
  %column.1 = phi i64 [ 0, %vector.done ], [ %column.1.next, %column.1.body ]
  %largest.column.1 = phi <16 x float> [ zeroinitializer, %vector.done ], [ %largest, %column.1.body ]
  %column.1.more = icmp slt i64 %column.1, 64
  br i1 %column.1.more, label %column.1.body, label %column.1.done
column.1.body:
  %x_at.1 = getelementptr float, ptr %x, i64 %column.1
  %x_columns.1 = load <16 x float>, ptr %x_at.1, align 4
  %sqrt_lane = insertelement <16 x float> poison, float %sqrt, i64 0
  %sqrt_lanes = shufflevector <16 x float> %sqrt_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %div.1 = fdiv <16 x float> %x_columns.1, %sqrt_lanes
  %gain_at = getelementptr float, ptr %gain, i64 %column.1
  %gain_columns = load <16 x float>, ptr %gain_at, align 4
  %mul.1 = fmul <16 x float> %div.1, %gain_columns
  %prologue_at = getelementptr float, ptr %prologue_row_at, i64 %column.1
  store <16 x float> %mul.1, ptr %prologue_at, align 4
  %magnitude = call <16 x float> @llvm.fabs.v16f32(<16 x float> %mul.1)
  %finite = fcmp olt <16 x float> %magnitude, splat (float 0x7FF0000000000000)  ; Inf
  %larger = fcmp ogt <16 x float> %magnitude, %largest.column.1
  %both = and <16 x i1> %finite, %larger
  %largest = select <16 x i1> %both, <16 x float> %magnitude, <16 x float> %largest.column.1
  %column.1.next = add i64 %column.1, 16
  br label %column.1.head
column.1.done:
  %row_factor_at = getelementptr float, ptr %row_factors, i64 %row
  call void @normalise(ptr %prologue_row_at, i64 64, <16 x float> %largest.column.1, ptr %row_factor_at)
  ret void
}

define internal void @q4jit_layer.rows(ptr %args, i64 %from, i64 %to) #0 {
entry:
  br label %row.head
row.head:
  %row = phi i64 [ %from, %entry ], [ %row.next, %row.body ]
  %row.more = icmp slt i64 %row, %to
  br i1 %row.more, label %row.body, label %row.done
row.body:
  call void @q4jit_layer.row(ptr %args, i64 %row)
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

; 16 columns of F32, one a lane, times 1 row of x; K = 64.
; 1 slab of 4096 bytes: 2 blocks of 32 elements; rows of x are 64 floats apart.
define internal void @f32_k64_rows1(ptr noalias %x, ptr noalias %w, ptr noalias %tile) #0 {
entry:
  br label %block.head
block.head:
  %block = phi i64 [ 0, %entry ], [ %block.next, %chunk.done ]
  %total0.block = phi <16 x float> [ zeroinitializer, %entry ], [ %total0, %chunk.done ]
  %block.more = icmp slt i64 %block, 2
  br i1 %block.more, label %block.body, label %block.done
block.body:
  ; prefetch 8192 bytes ahead
  br label %line.head
line.head:
  %line = phi i64 [ 0, %block.body ], [ %line.next, %line.body ]
  %line.more = icmp slt i64 %line, 32
  br i1 %line.more, label %line.body, label %line.done
line.body:
  %ahead = mul i64 %block, 2048
  %ahead.1 = mul i64 %line, 64
  %ahead.2 = add i64 %ahead, %ahead.1
  %ahead.3 = add i64 %ahead.2, 8192
  %ahead_at = getelementptr i8, ptr %w, i64 %ahead.3
  call void @llvm.prefetch.p0(ptr %ahead_at, i32 0, i32 2, i32 1)  ; read, second level
  %line.next = add i64 %line, 1
  br label %line.head, !llvm.loop !0
line.done:
  %k = mul i64 %block, 32
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
  %k.1 = mul i64 %chunk, 16
  %k.2 = mul i64 %word, 4
  %k.3 = add i64 %k, %k.1
  %k.4 = add i64 %k.3, %k.2
  %values_offset = mul i64 %block, 2048
  %values_at = getelementptr i8, ptr %w, i64 %values_offset
  %element = mul i64 %chunk, 16
  %element.1 = mul i64 %word, 4
  %element.2 = add i64 %element, %element.1
  %w_offset = mul i64 %element.2, 64
  %w_at = getelementptr i8, ptr %values_at, i64 %w_offset
  %weight = load <16 x float>, ptr %w_at, align 4
  %element.3 = add i64 %element.2, 1
  %w_offset.1 = mul i64 %element.3, 64
  %w_at.1 = getelementptr i8, ptr %values_at, i64 %w_offset.1
  %weight.1 = load <16 x float>, ptr %w_at.1, align 4
  %element.4 = add i64 %element.2, 2
  %w_offset.2 = mul i64 %element.4, 64
  %w_at.2 = getelementptr i8, ptr %values_at, i64 %w_offset.2
  %weight.2 = load <16 x float>, ptr %w_at.2, align 4
  %element.5 = add i64 %element.2, 3
  %w_offset.3 = mul i64 %element.5, 64
  %w_at.3 = getelementptr i8, ptr %values_at, i64 %w_offset.3
  %weight.3 = load <16 x float>, ptr %w_at.3, align 4
  ; x[k … k+3] times four weights of every column
  %x_at = getelementptr float, ptr %x, i64 %k.4
  %part0.0 = call <16 x float> @multiply_add(<16 x float> %part0.0.word, ptr %x_at, <16 x float> %weight)
  %x_offset = add i64 %k.4, 1
  %x_at.1 = getelementptr float, ptr %x, i64 %x_offset
  %part0.1 = call <16 x float> @multiply_add(<16 x float> %part0.1.word, ptr %x_at.1, <16 x float> %weight.1)
  %x_offset.1 = add i64 %k.4, 2
  %x_at.2 = getelementptr float, ptr %x, i64 %x_offset.1
  %part0.2 = call <16 x float> @multiply_add(<16 x float> %part0.2.word, ptr %x_at.2, <16 x float> %weight.2)
  %x_offset.2 = add i64 %k.4, 3
  %x_at.3 = getelementptr float, ptr %x, i64 %x_offset.2
  %part0.3 = call <16 x float> @multiply_add(<16 x float> %part0.3.word, ptr %x_at.3, <16 x float> %weight.3)
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
  %total0 = fadd <16 x float> %total0.block, %part.2
  %block.next = add i64 %block, 1
  br label %block.head, !llvm.loop !0
block.done:
  store <16 x float> %total0.block, ptr %tile, align 64
  ret void
}

; 16 of 40 columns for rows %first … %end: 1 product and the epilogue.
define internal void @q4jit_layer.section0(ptr %args, i64 %task, i64 %first, i64 %end) #0 {
entry:
  %w_slot = getelementptr %Slots, ptr %args, i64 0, i32 6
  %w = load ptr, ptr %w_slot, align 8
  %prologue_slot = getelementptr %Slots, ptr %args, i64 0, i32 8
  %prologue = load ptr, ptr %prologue_slot, align 8
  %row_factors_slot = getelementptr %Slots, ptr %args, i64 0, i32 9
  %row_factors = load ptr, ptr %row_factors_slot, align 8
  %output0_slot = getelementptr %Slots, ptr %args, i64 0, i32 7
  %output0 = load ptr, ptr %output0_slot, align 8
  %bias_slot = getelementptr %Slots, ptr %args, i64 0, i32 4
  %bias = load ptr, ptr %bias_slot, align 8
  %residual_slot = getelementptr %Slots, ptr %args, i64 0, i32 5
  %residual = load ptr, ptr %residual_slot, align 8
  %tile = alloca [1 x <16 x float>], align 64
  %w_offset = mul i64 %task, 4096
  %w_at = getelementptr i8, ptr %w, i64 %w_offset
  br label %tile_row.head
tile_row.head:
  %tile_row = phi i64 [ %first, %entry ], [ %tile_row.next, %tile_row.body ]
  %tile_row.more = icmp slt i64 %tile_row, %end
  br i1 %tile_row.more, label %tile_row.body, label %tile_row.done
tile_row.body:
  %x_offset = mul i64 %tile_row, 64
  %x_at = getelementptr float, ptr %prologue, i64 %x_offset
  call void @f32_k64_rows1(ptr %x_at, ptr %w_at, ptr %tile)
  %sums = load <16 x float>, ptr %tile, align 64
  %column = mul i64 %task, 16
  %left = sub i64 40, %column
  %more = icmp sgt i64 %left, 16
  %few = select i1 %more, i64 16, i64 %left
  %count = trunc i64 %few to i32
  %count_lane = insertelement <16 x i32> poison, i32 %count, i64 0
  %count_lanes = shufflevector <16 x i32> %count_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %mask = icmp slt <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>, %count_lanes
  %row_factor_at = getelementptr float, ptr %row_factors, i64 %tile_row
  %row_factor = load float, ptr %row_factor_at, align 4
  %row_factor_lane = insertelement <16 x float> poison, float %row_factor, i64 0
  %row_factor_lanes = shufflevector <16 x float> %row_factor_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %product = fmul <16 x float> %sums, %row_factor_lanes
  %output0_offset = mul i64 %tile_row, 40
  %output0_row_at = getelementptr float, ptr %output0, i64 %output0_offset
  %bias_at = getelementptr float, ptr %bias, i64 %column
  %bias_columns = call <16 x float> @llvm.masked.load.v16f32.p0(ptr %bias_at, i32 4, <16 x i1> %mask, <16 x float> zeroinitializer)
  %add = fadd <16 x float> %product, %bias_columns
  %residual_at = getelementptr float, ptr %residual, i64 %column
  %residual_columns = call <16 x float> @llvm.masked.load.v16f32.p0(ptr %residual_at, i32 4, <16 x i1> %mask, <16 x float> zeroinitializer)
  %add.1 = fadd <16 x float> %add, %residual_columns
  %output0_at = getelementptr float, ptr %output0_row_at, i64 %column
  call void @llvm.masked.store.v16f32.p0(<16 x float> %add.1, ptr %output0_at, i32 4, <16 x i1> %mask)
  %tile_row.next = add i64 %tile_row, 1
  br label %tile_row.head
tile_row.done:
  ret void
}

; Tasks are numbered through all sections.
define internal void @q4jit_layer.columns(ptr %args, i64 %from, i64 %to) #0 {
entry:
  %m_slot = getelementptr %Slots, ptr %args, i64 0, i32 1
  %m = load i64, ptr %m_slot, align 8
  br label %number.head
number.head:
  %number = phi i64 [ %from, %entry ], [ %number.next, %next ]
  %number.more = icmp slt i64 %number, %to
  br i1 %number.more, label %number.body, label %number.done
number.body:
  %below = icmp slt i64 %number, 3
  br i1 %below, label %section0, label %after0
section0:
  call void @q4jit_layer.section0(ptr %args, i64 %number, i64 0, i64 %m)
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
define void @q4jit_layer(ptr %args) #0 {
entry:
  %pool_slot = getelementptr %Slots, ptr %args, i64 0, i32 0
  %pool = load ptr, ptr %pool_slot, align 8
  %m_slot = getelementptr %Slots, ptr %args, i64 0, i32 1
  %m = load i64, ptr %m_slot, align 8
  call void @parallel_for(ptr %pool, ptr @q4jit_layer.rows, ptr %args, i64 %m, i64 128)
  call void @parallel_for(ptr %pool, ptr @q4jit_layer.columns, ptr %args, i64 3, i64 8)
  ret void
}

declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x float> @llvm.masked.load.v16f32.p0(ptr, i32, <16 x i1>, <16 x float>)
declare float @llvm.sqrt.f32(float)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare i32 @llvm.smax.i32(i32, i32)
declare i32 @llvm.smin.i32(i32, i32)
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

attributes #0 = { nounwind "prefer-vector-width"="256" "min-legal-vector-width"="256" }
attributes #1 = { alwaysinline nounwind }

!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}
