; add for cpu:x86-64, M = 1, made by q4jit
; rows:
;   v0 = x
; 40 columns:
;   v2 = v0 @ w    F32 [64, 40]
;   output0 = v2
;   output1 = v2 + residual

target triple = "x86_64-unknown-linux-gnu"

; The kernel's arguments, 8 bytes each.
%Slots = type {
  ptr,  ; 0 pool
  i64,  ; 1 m
  ptr,  ; 2 x
  ptr,  ; 3 residual
  ptr,  ; 4 w
  ptr,  ; 5 output0
  ptr,  ; 6 output1
  ptr,  ; 7 prologue
  ptr   ; 8 row_factors
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

; bf16 to f32, exactly.
define internal <16 x float> @bf16_to_f32_x16(<16 x i16> %value) #1 {
entry:
  %bits = zext <16 x i16> %value to <16 x i32>
  %high = shl <16 x i32> %bits, splat (i32 16)
  %wide = bitcast <16 x i32> %high to <16 x float>
  ret <16 x float> %wide
}

; One row before the products: x, and the row's values that the columns phase needs.
define internal void @q4jit_add.row(ptr %args, i64 %row) #0 {
entry:
  %prologue_slot = getelementptr %Slots, ptr %args, i64 0, i32 7
  %prologue = load ptr, ptr %prologue_slot, align 8
  %x_slot = getelementptr %Slots, ptr %args, i64 0, i32 2
  %x = load ptr, ptr %x_slot, align 8
  %row_factors_slot = getelementptr %Slots, ptr %args, i64 0, i32 8
  %row_factors = load ptr, ptr %row_factors_slot, align 8
  %prologue_offset = mul i64 %row, 64
  %prologue_row_at = getelementptr float, ptr %prologue, i64 %prologue_offset
  ; x of the products, and its largest finite magnitude
  br label %column.head
column.head:
  %column = phi i64 [ 0, %entry ], [ %column.next, %column.body ]
  %largest.column = phi <16 x float> [ zeroinitializer, %entry ], [ %largest, %column.body ]
  %column.more = icmp slt i64 %column, 64
  br i1 %column.more, label %column.body, label %column.done
column.body:
  %x_at = getelementptr i16, ptr %x, i64 %column
  %x_columns = load <16 x i16>, ptr %x_at, align 2
  %x_columns_f32 = call <16 x float> @bf16_to_f32_x16(<16 x i16> %x_columns)
  %prologue_at = getelementptr float, ptr %prologue_row_at, i64 %column
  store <16 x float> %x_columns_f32, ptr %prologue_at, align 4
  %magnitude = call <16 x float> @llvm.fabs.v16f32(<16 x float> %x_columns_f32)
  %finite = fcmp olt <16 x float> %magnitude, splat (float 0x7FF0000000000000)  ; Inf
  %larger = fcmp ogt <16 x float> %magnitude, %largest.column
  %both = and <16 x i1> %finite, %larger
  %largest = select <16 x i1> %both, <16 x float> %magnitude, <16 x float> %largest.column
  %column.next = add i64 %column, 16
  br label %column.head
column.done:
  %row_factor_at = getelementptr float, ptr %row_factors, i64 %row
  call void @normalise(ptr %prologue_row_at, i64 64, <16 x float> %largest.column, ptr %row_factor_at)
  ret void
}

define internal void @q4jit_add.rows(ptr %args, i64 %from, i64 %to) #0 {
entry:
  br label %row.head
row.head:
  %row = phi i64 [ %from, %entry ], [ %row.next, %row.body ]
  %row.more = icmp slt i64 %row, %to
  br i1 %row.more, label %row.body, label %row.done
row.body:
  call void @q4jit_add.row(ptr %args, i64 %row)
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
  %total = call <16 x float> @llvm.fmuladd.v16f32(<16 x float> %x_lanes, <16 x float> %weights, <16 x float> %sum)
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

; f32 to bf16, to nearest even.
define internal <16 x i16> @f32_to_bf16_x16(<16 x float> %value) #1 {
entry:
  %bits = bitcast <16 x float> %value to <16 x i32>
  %high = lshr <16 x i32> %bits, splat (i32 16)
  %odd = and <16 x i32> %high, splat (i32 1)  ; a tie is rounded up where this is 1
  %raised = add <16 x i32> %bits, splat (i32 32767)
  %rounded = add <16 x i32> %raised, %odd
  %finite = lshr <16 x i32> %rounded, splat (i32 16)
  %nan = or <16 x i32> %high, splat (i32 64)
  %is_nan = fcmp uno <16 x float> %value, %value
  %right = select <16 x i1> %is_nan, <16 x i32> %nan, <16 x i32> %finite
  %narrow = trunc <16 x i32> %right to <16 x i16>
  ret <16 x i16> %narrow
}

; f16 to f32, exactly.
define internal <16 x float> @f16_to_f32_x16(<16 x i16> %value) #1 {
entry:
  %bits = zext <16 x i16> %value to <16 x i32>
  %magnitude = and <16 x i32> %bits, splat (i32 32767)  ; all but the sign
  %shifted = shl <16 x i32> %magnitude, splat (i32 13)
  ; 2^112 moves the exponent from f16's bias to f32's, and is exact for denormals too
  %small = bitcast <16 x i32> %shifted to <16 x float>
  %value.1 = fmul <16 x float> %small, splat (float 5192296858534827628530496329220096.0)
  %finite = bitcast <16 x float> %value.1 to <16 x i32>
  %special = icmp uge <16 x i32> %magnitude, splat (i32 31744)  ; Inf or NaN
  %infinite = or <16 x i32> %shifted, splat (i32 u0x7F800000)  ; f32's exponent of those
  %right = select <16 x i1> %special, <16 x i32> %infinite, <16 x i32> %finite
  %sign = and <16 x i32> %bits, splat (i32 32768)
  %high = shl <16 x i32> %sign, splat (i32 16)
  %both = or <16 x i32> %right, %high
  %result = bitcast <16 x i32> %both to <16 x float>
  ret <16 x float> %result
}

; f32 to f16, to nearest even.
define internal <16 x i16> @f32_to_f16_x16(<16 x float> %value) #1 {
entry:
  %bits = bitcast <16 x float> %value to <16 x i32>
  %magnitude = and <16 x i32> %bits, splat (i32 u0x7FFFFFFF)
  %size = bitcast <16 x i32> %magnitude to <16 x float>
  %shifted = lshr <16 x i32> %magnitude, splat (i32 13)
  ; normal: the exponent gets f16's bias, and a tie is rounded up to an even mantissa
  %odd = and <16 x i32> %shifted, splat (i32 1)
  %rebased = sub <16 x i32> %magnitude, splat (i32 u0x37FFF001)
  %rounded = add <16 x i32> %rebased, %odd
  %normal = lshr <16 x i32> %rounded, splat (i32 13)
  ; denormal: adding 1/2 rounds to multiples of 2^-24
  %moved = fadd <16 x float> %size, splat (float 0.5)
  %moved_bits = bitcast <16 x float> %moved to <16 x i32>
  %denormal = sub <16 x i32> %moved_bits, splat (i32 u0x3F000000)
  %is_small = fcmp olt <16 x float> %size, splat (float 0x3F10000000000000)
  %finite = select <16 x i1> %is_small, <16 x i32> %denormal, <16 x i32> %normal
  %is_large = fcmp oge <16 x float> %size, splat (float 65520.0)
  %number = select <16 x i1> %is_large, <16 x i32> splat (i32 31744), <16 x i32> %finite
  %payload = and <16 x i32> %shifted, splat (i32 1023)
  %nan = or <16 x i32> %payload, splat (i32 32256)
  %is_nan = fcmp uno <16 x float> %value, %value
  %right = select <16 x i1> %is_nan, <16 x i32> %nan, <16 x i32> %number
  %high = lshr <16 x i32> %bits, splat (i32 16)
  %sign = and <16 x i32> %high, splat (i32 32768)
  %both = or <16 x i32> %right, %sign
  %narrow = trunc <16 x i32> %both to <16 x i16>
  ret <16 x i16> %narrow
}

; 16 of 40 columns for rows %first … %end: 1 product and the epilogue.
define internal void @q4jit_add.section0(ptr %args, i64 %task, i64 %first, i64 %end) #0 {
entry:
  %w_slot = getelementptr %Slots, ptr %args, i64 0, i32 4
  %w = load ptr, ptr %w_slot, align 8
  %prologue_slot = getelementptr %Slots, ptr %args, i64 0, i32 7
  %prologue = load ptr, ptr %prologue_slot, align 8
  %row_factors_slot = getelementptr %Slots, ptr %args, i64 0, i32 8
  %row_factors = load ptr, ptr %row_factors_slot, align 8
  %output0_slot = getelementptr %Slots, ptr %args, i64 0, i32 5
  %output0 = load ptr, ptr %output0_slot, align 8
  %output1_slot = getelementptr %Slots, ptr %args, i64 0, i32 6
  %output1 = load ptr, ptr %output1_slot, align 8
  %residual_slot = getelementptr %Slots, ptr %args, i64 0, i32 3
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
  %output0_row_at = getelementptr i16, ptr %output0, i64 %output0_offset
  %output0_at = getelementptr i16, ptr %output0_row_at, i64 %column
  %bf16 = call <16 x i16> @f32_to_bf16_x16(<16 x float> %product)
  call void @llvm.masked.store.v16i16.p0(<16 x i16> %bf16, ptr %output0_at, i32 2, <16 x i1> %mask)
  %output1_offset = mul i64 %tile_row, 40
  %output1_row_at = getelementptr i16, ptr %output1, i64 %output1_offset
  %residual_at = getelementptr i16, ptr %residual, i64 %column
  %residual_columns = call <16 x i16> @llvm.masked.load.v16i16.p0(ptr %residual_at, i32 2, <16 x i1> %mask, <16 x i16> zeroinitializer)
  %residual_columns_f32 = call <16 x float> @f16_to_f32_x16(<16 x i16> %residual_columns)
  %add = fadd <16 x float> %product, %residual_columns_f32
  %output1_at = getelementptr i16, ptr %output1_row_at, i64 %column
  %f16 = call <16 x i16> @f32_to_f16_x16(<16 x float> %add)
  call void @llvm.masked.store.v16i16.p0(<16 x i16> %f16, ptr %output1_at, i32 2, <16 x i1> %mask)
  %tile_row.next = add i64 %tile_row, 1
  br label %tile_row.head
tile_row.done:
  ret void
}

; Tasks are numbered through all sections.
define internal void @q4jit_add.columns(ptr %args, i64 %from, i64 %to) #0 {
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
  call void @q4jit_add.section0(ptr %args, i64 %number, i64 0, i64 %m)
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
define void @q4jit_add(ptr %args) #0 {
entry:
  %pool_slot = getelementptr %Slots, ptr %args, i64 0, i32 0
  %pool = load ptr, ptr %pool_slot, align 8
  %m_slot = getelementptr %Slots, ptr %args, i64 0, i32 1
  %m = load i64, ptr %m_slot, align 8
  call void @parallel_for(ptr %pool, ptr @q4jit_add.rows, ptr %args, i64 %m, i64 128)
  call void @parallel_for(ptr %pool, ptr @q4jit_add.columns, ptr %args, i64 3, i64 8)
  ret void
}

declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
declare <16 x float> @llvm.fmuladd.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x i16> @llvm.masked.load.v16i16.p0(ptr, i32, <16 x i1>, <16 x i16>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare i32 @llvm.smax.i32(i32, i32)
declare i32 @llvm.smin.i32(i32, i32)
declare void @llvm.masked.store.v16i16.p0(<16 x i16>, ptr, i32, <16 x i1>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

attributes #0 = { nounwind "prefer-vector-width"="128" "min-legal-vector-width"="128" }
attributes #1 = { alwaysinline nounwind }

!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}
