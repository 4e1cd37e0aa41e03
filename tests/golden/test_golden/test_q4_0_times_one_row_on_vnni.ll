; product for cpu:x86-64-v4+avx512vnni, M = 1, 3 digits by vpdpbusd, made by q4jit
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
  ptr,  ; 6 row_factors
  ptr   ; 7 digits
}

; 32 elements of x that share a step: integers X = x / step, in digits.
%Unit = type {
  i32,             ; 0 lift, at the position of a float's exponent
  float,           ; 1 sum of X without the highest digit
  [2 x i32],       ; 2 −8 · sum of X, of each half of the unit
  [2 x i32],       ; 3 the same for the highest digit
  i32,             ; 4 −8 · sum of X
  i32,             ; 5 the same for the highest digit
  [3 x [32 x i8]]  ; 6 the digits, the highest first
}

; What follows the units of a row.
%RowEnd = type {
  i32,       ; 0 number of rough units, which digits cannot hold
  float,     ; 1 step of lift 0
  [0 x i32]  ; 2 numbers of the rough units
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

; x as integers of 24 bits in units of 32 that share a step.
define internal void @write_digits(ptr noalias %x, ptr noalias %units, i64 %count) #0 {
entry:
  %end_at = getelementptr %Unit, ptr %units, i64 %count
  %rough_units_at = getelementptr %RowEnd, ptr %end_at, i64 0, i32 2
  ; the mean magnitude of the elements that are finite and not 0
  %elements = mul i64 %count, 32
  br label %element.head
element.head:
  %element = phi i64 [ 0, %entry ], [ %element.next, %element.body ]
  %number.element = phi <16 x float> [ zeroinitializer, %entry ], [ %number, %element.body ]
  %sum.element = phi <16 x float> [ zeroinitializer, %entry ], [ %sum, %element.body ]
  %element.more = icmp slt i64 %element, %elements
  br i1 %element.more, label %element.body, label %element.done
element.body:
  %x_at = getelementptr float, ptr %x, i64 %element
  %x.1 = load <16 x float>, ptr %x_at, align 4
  %magnitude = call <16 x float> @llvm.fabs.v16f32(<16 x float> %x.1)
  %not_zero = fcmp ogt <16 x float> %magnitude, zeroinitializer
  %finite = fcmp olt <16 x float> %magnitude, splat (float 0x7FF0000000000000)  ; Inf
  %counted = and <16 x i1> %not_zero, %finite
  %kept = select <16 x i1> %counted, <16 x float> splat (float 1.0), <16 x float> zeroinitializer
  %number = fadd <16 x float> %number.element, %kept
  %kept.1 = select <16 x i1> %counted, <16 x float> %magnitude, <16 x float> zeroinitializer
  %sum = fadd <16 x float> %sum.element, %kept.1
  %element.next = add i64 %element, 16
  br label %element.head
element.done:
  %sum.1 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %sum.element)
  %number.1 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %number.element)
  %mean = fdiv float %sum.1, %number.1
  %usual = fmul float %mean, 2.0
  ; the usual energy, and each unit's largest magnitude, which waits in its header
  %usual_lane = insertelement <16 x float> poison, float %usual, i64 0
  %usual_lanes = shufflevector <16 x float> %usual_lane, <16 x float> poison, <16 x i32> zeroinitializer
  br label %unit.head
unit.head:
  %unit = phi i64 [ 0, %element.done ], [ %unit.next, %unit.body ]
  %energy.unit = phi <16 x float> [ zeroinitializer, %element.done ], [ %energy.1, %unit.body ]
  %squared_tops.unit = phi float [ 0.0, %element.done ], [ %squared_tops, %unit.body ]
  %largest.unit = phi i32 [ 0, %element.done ], [ %largest, %unit.body ]
  %unit.more = icmp slt i64 %unit, %count
  br i1 %unit.more, label %unit.body, label %unit.done
unit.body:
  %x_offset = mul i64 %unit, 32
  %x_at.1 = getelementptr float, ptr %x, i64 %x_offset
  %second_half_at = getelementptr float, ptr %x_at.1, i64 16
  %x.2 = load <16 x float>, ptr %x_at.1, align 4
  %x.3 = load <16 x float>, ptr %second_half_at, align 4
  %bits = bitcast <16 x float> %x.2 to <16 x i32>
  %size = and <16 x i32> %bits, splat (i32 u0x7FFFFFFF)  ; all but the sign
  %magnitude.1 = bitcast <16 x i32> %size to <16 x float>
  %inside = fcmp ole <16 x float> %magnitude.1, %usual_lanes
  %square = fmul <16 x float> %x.2, %x.2
  %kept.2 = select <16 x i1> %inside, <16 x float> %square, <16 x float> zeroinitializer
  %energy = fadd <16 x float> %energy.unit, %kept.2
  %bits.1 = bitcast <16 x float> %x.3 to <16 x i32>
  %size.1 = and <16 x i32> %bits.1, splat (i32 u0x7FFFFFFF)  ; all but the sign
  %magnitude.2 = bitcast <16 x i32> %size.1 to <16 x float>
  %inside.1 = fcmp ole <16 x float> %magnitude.2, %usual_lanes
  %square.1 = fmul <16 x float> %x.3, %x.3
  %kept.3 = select <16 x i1> %inside.1, <16 x float> %square.1, <16 x float> zeroinitializer
  %energy.1 = fadd <16 x float> %energy, %kept.3
  ; magnitudes compare like their bits as integers; Inf and NaN are the largest
  %larger = call <16 x i32> @llvm.smax.v16i32(<16 x i32> %size, <16 x i32> %size.1)
  %top = call i32 @llvm.vector.reduce.smax.v16i32(<16 x i32> %larger)
  %unit_at = getelementptr %Unit, ptr %units, i64 %unit
  %lift_at = getelementptr %Unit, ptr %unit_at, i64 0, i32 0
  store i32 %top, ptr %lift_at, align 4
  %finite.1 = icmp slt i32 %top, u0x7F800000  ; Inf
  %counted.1 = select i1 %finite.1, i32 %top, i32 0
  %top_float = bitcast i32 %counted.1 to float
  %square.2 = fmul float %top_float, %top_float
  %squared_tops = fadd float %squared_tops.unit, %square.2
  %largest = call i32 @llvm.smax.i32(i32 %largest.unit, i32 %counted.1)
  %unit.next = add i64 %unit, 1
  br label %unit.head
unit.done:
  %energy.2 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %energy.unit)
  %float_count = sitofp i64 %count to float
  %mean_energy = fdiv float %energy.2, %float_count
  %share = fmul float %mean_energy, 0x40299999A0000000  ; 12.8: of a unit that loses half of its share
  %root = call float @llvm.sqrt.f32(float %share)
  %limit = bitcast float %root to i32
  %most = fmul float %energy.2, 0x40399999A0000000  ; 25.6: of a row that loses what it may
  %loses_little = fcmp ole float %squared_tops.unit, %most
  %limit.1 = select i1 %loses_little, i32 u0x7F7FFFFF, i32 %limit  ; finite: no limit
  %limit.2 = call i32 @llvm.smin.i32(i32 %limit.1, i32 u0x7F7FFFFF)
  %largest.1 = call i32 @llvm.smin.i32(i32 %largest.unit, i32 %limit.2)
  %tiny = icmp slt i32 %largest.1, u0x27800000  ; below 2^-48 1/step overflows
  %limit.3 = select i1 %tiny, i32 0, i32 %limit.2
  %largest.2 = call i32 @llvm.smax.i32(i32 %largest.1, i32 u0x27800000)
  ; 1/step of the row's largest unit
  %size.2 = bitcast i32 %largest.2 to float
  %most.1 = fdiv float 8355700.0, %size.2
  %most_bits = bitcast float %most.1 to i32
  %inverse_step = and i32 %most_bits, u0x7F800000  ; the exponent: a power of two
  br label %unit.1.head
unit.1.head:
  %unit.1 = phi i64 [ 0, %unit.done ], [ %unit.1.next, %unit.1.body ]
  %rough_count.unit.1 = phi i64 [ 0, %unit.done ], [ %rough_count, %unit.1.body ]
  %unit.1.more = icmp slt i64 %unit.1, %count
  br i1 %unit.1.more, label %unit.1.body, label %unit.1.done
unit.1.body:
  %unit_at.1 = getelementptr %Unit, ptr %units, i64 %unit.1
  %lift_at.1 = getelementptr %Unit, ptr %unit_at.1, i64 0, i32 0
  %top.1 = load i32, ptr %lift_at.1, align 4
  %high = icmp sgt i32 %top.1, %limit.3
  %least = sub i32 %largest.2, u0x19000000  ; 2^-50 of it, by its exponent
  %not_zero.1 = icmp ne i32 %top.1, 0
  %below = icmp slt i32 %top.1, %least
  %low = and i1 %not_zero.1, %below
  %rough = or i1 %high, %low
  %held = call i32 @llvm.smax.i32(i32 %top.1, i32 %least)
  %held.1 = call i32 @llvm.smin.i32(i32 %held, i32 %largest.2)
  %size.3 = bitcast i32 %held.1 to float
  %most.2 = fdiv float 8355700.0, %size.3
  %most_bits.1 = bitcast float %most.2 to i32
  %inverse_step.1 = and i32 %most_bits.1, u0x7F800000  ; the exponent: a power of two
  %inverse = bitcast i32 %inverse_step.1 to float
  %depth = sub i32 %inverse_step.1, %inverse_step
  %lift = sub i32 u0x19000000, %depth
  %lift.1 = select i1 %rough, i32 0, i32 %lift
  %x_offset.1 = mul i64 %unit.1, 32
  %x_at.2 = getelementptr float, ptr %x, i64 %x_offset.1
  %second_half_at.1 = getelementptr float, ptr %x_at.2, i64 16
  %x.4 = load <16 x float>, ptr %x_at.2, align 4
  %x.5 = load <16 x float>, ptr %second_half_at.1, align 4
  %inverse_lane = insertelement <16 x float> poison, float %inverse, i64 0
  %inverse_lanes = shufflevector <16 x float> %inverse_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %scaled = fmul <16 x float> %x.4, %inverse_lanes
  %whole = call <16 x float> @llvm.rint.v16f32(<16 x float> %scaled)
  %X = fptosi <16 x float> %whole to <16 x i32>
  %X.1 = select i1 %rough, <16 x i32> zeroinitializer, <16 x i32> %X
  %inverse_lane.1 = insertelement <16 x float> poison, float %inverse, i64 0
  %inverse_lanes.1 = shufflevector <16 x float> %inverse_lane.1, <16 x float> poison, <16 x i32> zeroinitializer
  %scaled.1 = fmul <16 x float> %x.5, %inverse_lanes.1
  %whole.1 = call <16 x float> @llvm.rint.v16f32(<16 x float> %scaled.1)
  %X.2 = fptosi <16 x float> %whole.1 to <16 x i32>
  %X.3 = select i1 %rough, <16 x i32> zeroinitializer, <16 x i32> %X.2
  store i32 %lift.1, ptr %lift_at.1, align 4
  %both_halves = add <16 x i32> %X.1, %X.3
  %sum.2 = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %both_halves)
  %stored_sum = mul i32 %sum.2, -8
  %whole_sum_at = getelementptr %Unit, ptr %unit_at.1, i64 0, i32 4
  store i32 %stored_sum, ptr %whole_sum_at, align 4
  ; adding 128 to each digit carries above 127; flipping the sign bit takes 128 off
  %carried = add <16 x i32> %X.1, splat (i32 u0x00808080)
  %shifted = lshr <16 x i32> %carried, splat (i32 16)
  %low_byte = trunc <16 x i32> %shifted to <16 x i8>
  %digit = xor <16 x i8> %low_byte, splat (i8 -128)  ; less the 128
  %digits_at = getelementptr %Unit, ptr %unit_at.1, i64 0, i32 6, i64 0, i64 0
  store <16 x i8> %digit, ptr %digits_at, align 16
  %carried.1 = add <16 x i32> %X.3, splat (i32 u0x00808080)
  %shifted.1 = lshr <16 x i32> %carried.1, splat (i32 16)
  %low_byte.1 = trunc <16 x i32> %shifted.1 to <16 x i8>
  %digit.1 = xor <16 x i8> %low_byte.1, splat (i8 -128)  ; less the 128
  %digits_at.1 = getelementptr %Unit, ptr %unit_at.1, i64 0, i32 6, i64 0, i64 16
  store <16 x i8> %digit.1, ptr %digits_at.1, align 16
  %carried.2 = add <16 x i32> %X.1, splat (i32 u0x00808080)
  %shifted.2 = lshr <16 x i32> %carried.2, splat (i32 8)
  %low_byte.2 = trunc <16 x i32> %shifted.2 to <16 x i8>
  %digit.2 = xor <16 x i8> %low_byte.2, splat (i8 -128)  ; less the 128
  %digits_at.2 = getelementptr %Unit, ptr %unit_at.1, i64 0, i32 6, i64 1, i64 0
  store <16 x i8> %digit.2, ptr %digits_at.2, align 16
  %carried.3 = add <16 x i32> %X.3, splat (i32 u0x00808080)
  %shifted.3 = lshr <16 x i32> %carried.3, splat (i32 8)
  %low_byte.3 = trunc <16 x i32> %shifted.3 to <16 x i8>
  %digit.3 = xor <16 x i8> %low_byte.3, splat (i8 -128)  ; less the 128
  %digits_at.3 = getelementptr %Unit, ptr %unit_at.1, i64 0, i32 6, i64 1, i64 16
  store <16 x i8> %digit.3, ptr %digits_at.3, align 16
  %carried.4 = add <16 x i32> %X.1, splat (i32 u0x00808080)
  %low_byte.4 = trunc <16 x i32> %carried.4 to <16 x i8>
  %digit.4 = xor <16 x i8> %low_byte.4, splat (i8 -128)  ; less the 128
  %digits_at.4 = getelementptr %Unit, ptr %unit_at.1, i64 0, i32 6, i64 2, i64 0
  store <16 x i8> %digit.4, ptr %digits_at.4, align 16
  %carried.5 = add <16 x i32> %X.3, splat (i32 u0x00808080)
  %low_byte.5 = trunc <16 x i32> %carried.5 to <16 x i8>
  %digit.5 = xor <16 x i8> %low_byte.5, splat (i8 -128)  ; less the 128
  %digits_at.5 = getelementptr %Unit, ptr %unit_at.1, i64 0, i32 6, i64 2, i64 16
  store <16 x i8> %digit.5, ptr %digits_at.5, align 16
  ; every unit is written to the list's end, and stays there if it is rough
  %number.2 = trunc i64 %unit.1 to i32
  %entry_at = getelementptr i32, ptr %rough_units_at, i64 %rough_count.unit.1
  store i32 %number.2, ptr %entry_at, align 4
  %more = zext i1 %rough to i64
  %rough_count = add i64 %rough_count.unit.1, %more
  %unit.1.next = add i64 %unit.1, 1
  br label %unit.1.head
unit.1.done:
  %count.1 = trunc i64 %rough_count.unit.1 to i32
  %rough_count_at = getelementptr %RowEnd, ptr %end_at, i64 0, i32 0
  store i32 %count.1, ptr %rough_count_at, align 4
  ; the smallest step: the largest one times 2^-50, by exponents
  %smallest_step = sub i32 u0x66000000, %inverse_step
  %smallest_step_at = getelementptr %RowEnd, ptr %end_at, i64 0, i32 1
  store i32 %smallest_step, ptr %smallest_step_at, align 4
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
  %digits_slot = getelementptr %Slots, ptr %args, i64 0, i32 7
  %digits = load ptr, ptr %digits_slot, align 8
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
  %digits_offset = mul i64 %row, 16960
  %digits_at = getelementptr i8, ptr %digits, i64 %digits_offset
  call void @write_digits(ptr %prologue_row_at, ptr %digits_at, i64 128)
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

; f16 as f32, exactly.
define internal <16 x float> @load_f16_v16f32(ptr %at) #1 {
entry:
  %f16 = load <16 x half>, ptr %at, align 2
  %value = fpext <16 x half> %f16 to <16 x float>
  ret <16 x float> %value
}

; vpdpbusd: four products of bytes in each of 16 lanes.
define internal <16 x i32> @dot4(<16 x i32> %sum, <16 x i32> %codes, <16 x i32> %x) #1 {
entry:
  %code_bytes = bitcast <16 x i32> %codes to <64 x i8>
  %x_bytes = bitcast <16 x i32> %x to <64 x i8>
  %total = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %sum, <64 x i8> %code_bytes, <64 x i8> %x_bytes)
  ret <16 x i32> %total
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

; Q4_0: the quant in the lowest bits of each lane, as a float.
define internal <16 x float> @quant_q4_0(<16 x i32> %bits0) #1 {
entry:
  ; vpermps reads only the low four bits of a lane: it masks, subtracts and converts
  %quant = call <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float> <float -8.0, float -7.0, float -6.0, float -5.0, float -4.0, float -3.0, float -2.0, float -1.0, float 0.0, float 1.0, float 2.0, float 3.0, float 4.0, float 5.0, float 6.0, float 7.0>, <16 x i32> %bits0)
  ret <16 x float> %quant
}

; 16 columns times the rough units of a row of x, as floats, added to 16 sums.
define internal void @q4_0_k4096_rough(ptr noalias %x, ptr noalias %end, ptr noalias %w, ptr noalias %sums) #0 {
entry:
  %total = load <16 x float>, ptr %sums, align 64
  %rough_count_at = getelementptr %RowEnd, ptr %end, i64 0, i32 0
  %rough_count = load i32, ptr %rough_count_at, align 4
  %rough_units_at = getelementptr %RowEnd, ptr %end, i64 0, i32 2
  %count = sext i32 %rough_count to i64
  br label %i.head
i.head:
  %i = phi i64 [ 0, %entry ], [ %i.next, %chunk.done ]
  %total.i = phi <16 x float> [ %total, %entry ], [ %total.1, %chunk.done ]
  %i.more = icmp slt i64 %i, %count
  br i1 %i.more, label %i.body, label %i.done
i.body:
  %entry_at = getelementptr i32, ptr %rough_units_at, i64 %i
  %unit32 = load i32, ptr %entry_at, align 4
  %unit = sext i32 %unit32 to i64
  %slab = udiv i64 %unit, 2
  %block_in_slab = urem i64 %unit, 2
  %slab_offset = mul i64 %slab, 576
  %slab_at = getelementptr i8, ptr %w, i64 %slab_offset
  %first = mul i64 %unit, 32
  %block_scale_offset = mul i64 %block_in_slab, 32
  %block_scale_at = getelementptr i8, ptr %slab_at, i64 %block_scale_offset
  %block_scale = call <16 x float> @load_f16_v16f32(ptr %block_scale_at)
  br label %chunk.head
chunk.head:
  %chunk = phi i64 [ 0, %i.body ], [ %chunk.next, %word.done ]
  %part.chunk = phi <16 x float> [ zeroinitializer, %i.body ], [ %part.word, %word.done ]
  %chunk.more = icmp slt i64 %chunk, 2
  br i1 %chunk.more, label %chunk.body, label %chunk.done
chunk.body:
  %layer32 = trunc i64 %chunk to i32
  %shift = mul i32 %layer32, 4
  %quants0_offset = mul i64 %block_in_slab, 256
  %quants0_offset.1 = add i64 %quants0_offset, 64
  %quants0_at = getelementptr i8, ptr %slab_at, i64 %quants0_offset.1
  br label %word.head
word.head:
  %word = phi i64 [ 0, %chunk.body ], [ %word.next, %word.body ]
  %part.word = phi <16 x float> [ %part.chunk, %chunk.body ], [ %part.3, %word.body ]
  %word.more = icmp slt i64 %word, 4
  br i1 %word.more, label %word.body, label %word.done
word.body:
  %k = mul i64 %chunk, 16
  %k.1 = mul i64 %word, 4
  %k.2 = add i64 %first, %k
  %k.3 = add i64 %k.2, %k.1
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
  %x_at = getelementptr float, ptr %x, i64 %k.3
  %x.1 = load float, ptr %x_at, align 4
  %x_lane = insertelement <16 x float> poison, float %x.1, i64 0
  %x_lanes = shufflevector <16 x float> %x_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %part = call <16 x float> @llvm.fma.v16f32(<16 x float> %x_lanes, <16 x float> %quant0, <16 x float> %part.word)
  %k.4 = add i64 %k.3, 1
  %x_at.1 = getelementptr float, ptr %x, i64 %k.4
  %x.2 = load float, ptr %x_at.1, align 4
  %x_lane.1 = insertelement <16 x float> poison, float %x.2, i64 0
  %x_lanes.1 = shufflevector <16 x float> %x_lane.1, <16 x float> poison, <16 x i32> zeroinitializer
  %part.1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %x_lanes.1, <16 x float> %quant1, <16 x float> %part)
  %k.5 = add i64 %k.3, 2
  %x_at.2 = getelementptr float, ptr %x, i64 %k.5
  %x.3 = load float, ptr %x_at.2, align 4
  %x_lane.2 = insertelement <16 x float> poison, float %x.3, i64 0
  %x_lanes.2 = shufflevector <16 x float> %x_lane.2, <16 x float> poison, <16 x i32> zeroinitializer
  %part.2 = call <16 x float> @llvm.fma.v16f32(<16 x float> %x_lanes.2, <16 x float> %quant2, <16 x float> %part.1)
  %k.6 = add i64 %k.3, 3
  %x_at.3 = getelementptr float, ptr %x, i64 %k.6
  %x.4 = load float, ptr %x_at.3, align 4
  %x_lane.3 = insertelement <16 x float> poison, float %x.4, i64 0
  %x_lanes.3 = shufflevector <16 x float> %x_lane.3, <16 x float> poison, <16 x i32> zeroinitializer
  %part.3 = call <16 x float> @llvm.fma.v16f32(<16 x float> %x_lanes.3, <16 x float> %quant3, <16 x float> %part.2)
  %word.next = add i64 %word, 1
  br label %word.head, !llvm.loop !0
word.done:
  %chunk.next = add i64 %chunk, 1
  br label %chunk.head, !llvm.loop !0
chunk.done:
  %total.1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %block_scale, <16 x float> %part.chunk, <16 x float> %total.i)
  %i.next = add i64 %i, 1
  br label %i.head
i.done:
  store <16 x float> %total.i, ptr %sums, align 64
  ret void
}

; 16 columns of Q4_0, one a lane, times 1 row of x in 3 digits of int8; K = 4096.
; vpdpbusd multiplies four codes with four digits in each lane.
define internal void @q4_0_k4096_rows1_digits3(ptr noalias %x, ptr noalias %units, ptr noalias %w0, ptr noalias %tile) #0 {
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
  %total0.0.slab = phi <16 x float> [ zeroinitializer, %stretch.body ], [ %total0.0.block, %block.done ]
  %slab.more = icmp slt i64 %slab, %stretch_end
  br i1 %slab.more, label %slab.body, label %slab.done
slab.body:
  %slab_offset = mul i64 %slab, 576
  %slab_at = getelementptr i8, ptr %w0, i64 %slab_offset
  br label %block.head
block.head:
  %block = phi i64 [ 0, %slab.body ], [ %block.next, %word.1.done ]
  %total0.0.block = phi <16 x float> [ %total0.0.slab, %slab.body ], [ %total0.0, %word.1.done ]
  %block.more = icmp slt i64 %block, 2
  br i1 %block.more, label %block.body, label %block.done
block.body:
  %unit = mul i64 %slab, 2
  %unit.1 = add i64 %unit, %block
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
  %unit_at = getelementptr %Unit, ptr %units, i64 %unit.1
  %quants0_offset = mul i64 %block, 256
  %quants0_offset.1 = add i64 %quants0_offset, 64
  %quants0_at = getelementptr i8, ptr %slab_at, i64 %quants0_offset.1
  br label %word.head
word.head:
  %word = phi i64 [ 0, %line.done ], [ %word.next, %word.body ]
  %chain0.0.digit0.chunk0.word = phi <16 x i32> [ zeroinitializer, %line.done ], [ %chain, %word.body ]
  %chain0.0.digit1.chunk0.word = phi <16 x i32> [ zeroinitializer, %line.done ], [ %chain.1, %word.body ]
  %chain0.0.digit2.chunk0.word = phi <16 x i32> [ zeroinitializer, %line.done ], [ %chain.2, %word.body ]
  %word.more = icmp slt i64 %word, 4
  br i1 %word.more, label %word.body, label %word.done
word.body:
  %word_at = getelementptr <16 x i32>, ptr %quants0_at, i64 %word
  %word_bits = load <16 x i32>, ptr %word_at, align 32
  %codes = and <16 x i32> %word_bits, splat (i32 u0x0F0F0F0F)  ; the lowest 4 bits of each byte
  %digits_offset = mul i64 %word, 4
  %digits_offset.1 = add i64 %digits_offset, 32
  %digits_at = getelementptr i8, ptr %unit_at, i64 %digits_offset.1
  %digits = load i32, ptr %digits_at, align 4  ; four elements of digit 0
  %digits_lane = insertelement <16 x i32> poison, i32 %digits, i64 0
  %digits_lanes = shufflevector <16 x i32> %digits_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %chain = call <16 x i32> @dot4(<16 x i32> %chain0.0.digit0.chunk0.word, <16 x i32> %codes, <16 x i32> %digits_lanes)
  %digits_offset.2 = mul i64 %word, 4
  %digits_offset.3 = add i64 %digits_offset.2, 64
  %digits_at.1 = getelementptr i8, ptr %unit_at, i64 %digits_offset.3
  %digits.1 = load i32, ptr %digits_at.1, align 4  ; four elements of digit 1
  %digits_lane.1 = insertelement <16 x i32> poison, i32 %digits.1, i64 0
  %digits_lanes.1 = shufflevector <16 x i32> %digits_lane.1, <16 x i32> poison, <16 x i32> zeroinitializer
  %chain.1 = call <16 x i32> @dot4(<16 x i32> %chain0.0.digit1.chunk0.word, <16 x i32> %codes, <16 x i32> %digits_lanes.1)
  %digits_offset.4 = mul i64 %word, 4
  %digits_offset.5 = add i64 %digits_offset.4, 96
  %digits_at.2 = getelementptr i8, ptr %unit_at, i64 %digits_offset.5
  %digits.2 = load i32, ptr %digits_at.2, align 4  ; four elements of digit 2
  %digits_lane.2 = insertelement <16 x i32> poison, i32 %digits.2, i64 0
  %digits_lanes.2 = shufflevector <16 x i32> %digits_lane.2, <16 x i32> poison, <16 x i32> zeroinitializer
  %chain.2 = call <16 x i32> @dot4(<16 x i32> %chain0.0.digit2.chunk0.word, <16 x i32> %codes, <16 x i32> %digits_lanes.2)
  %word.next = add i64 %word, 1
  br label %word.head, !llvm.loop !0
word.done:
  %quants0_offset.2 = mul i64 %block, 256
  %quants0_offset.3 = add i64 %quants0_offset.2, 64
  %quants0_at.1 = getelementptr i8, ptr %slab_at, i64 %quants0_offset.3
  br label %word.1.head
word.1.head:
  %word.1 = phi i64 [ 0, %word.done ], [ %word.1.next, %word.1.body ]
  %chain0.0.digit0.chunk1.word.1 = phi <16 x i32> [ zeroinitializer, %word.done ], [ %chain.3, %word.1.body ]
  %chain0.0.digit1.chunk1.word.1 = phi <16 x i32> [ zeroinitializer, %word.done ], [ %chain.4, %word.1.body ]
  %chain0.0.digit2.chunk1.word.1 = phi <16 x i32> [ zeroinitializer, %word.done ], [ %chain.5, %word.1.body ]
  %word.1.more = icmp slt i64 %word.1, 4
  br i1 %word.1.more, label %word.1.body, label %word.1.done
word.1.body:
  %word_at.1 = getelementptr <16 x i32>, ptr %quants0_at.1, i64 %word.1
  %word_bits.1 = load <16 x i32>, ptr %word_at.1, align 32
  %shifted = lshr <16 x i32> %word_bits.1, splat (i32 4)
  %codes.1 = and <16 x i32> %shifted, splat (i32 u0x0F0F0F0F)  ; the lowest 4 bits of each byte
  %digits_offset.6 = mul i64 %word.1, 4
  %digits_offset.7 = add i64 %digits_offset.6, 48
  %digits_at.3 = getelementptr i8, ptr %unit_at, i64 %digits_offset.7
  %digits.3 = load i32, ptr %digits_at.3, align 4  ; four elements of digit 0
  %digits_lane.3 = insertelement <16 x i32> poison, i32 %digits.3, i64 0
  %digits_lanes.3 = shufflevector <16 x i32> %digits_lane.3, <16 x i32> poison, <16 x i32> zeroinitializer
  %chain.3 = call <16 x i32> @dot4(<16 x i32> %chain0.0.digit0.chunk1.word.1, <16 x i32> %codes.1, <16 x i32> %digits_lanes.3)
  %digits_offset.8 = mul i64 %word.1, 4
  %digits_offset.9 = add i64 %digits_offset.8, 80
  %digits_at.4 = getelementptr i8, ptr %unit_at, i64 %digits_offset.9
  %digits.4 = load i32, ptr %digits_at.4, align 4  ; four elements of digit 1
  %digits_lane.4 = insertelement <16 x i32> poison, i32 %digits.4, i64 0
  %digits_lanes.4 = shufflevector <16 x i32> %digits_lane.4, <16 x i32> poison, <16 x i32> zeroinitializer
  %chain.4 = call <16 x i32> @dot4(<16 x i32> %chain0.0.digit1.chunk1.word.1, <16 x i32> %codes.1, <16 x i32> %digits_lanes.4)
  %digits_offset.10 = mul i64 %word.1, 4
  %digits_offset.11 = add i64 %digits_offset.10, 112
  %digits_at.5 = getelementptr i8, ptr %unit_at, i64 %digits_offset.11
  %digits.5 = load i32, ptr %digits_at.5, align 4  ; four elements of digit 2
  %digits_lane.5 = insertelement <16 x i32> poison, i32 %digits.5, i64 0
  %digits_lanes.5 = shufflevector <16 x i32> %digits_lane.5, <16 x i32> poison, <16 x i32> zeroinitializer
  %chain.5 = call <16 x i32> @dot4(<16 x i32> %chain0.0.digit2.chunk1.word.1, <16 x i32> %codes.1, <16 x i32> %digits_lanes.5)
  %word.1.next = add i64 %word.1, 1
  br label %word.1.head, !llvm.loop !0
word.1.done:
  %total = add <16 x i32> %chain0.0.digit0.chunk0.word, %chain0.0.digit0.chunk1.word.1
  %shifted.1 = shl <16 x i32> %total, splat (i32 8)
  %total.1 = add <16 x i32> %shifted.1, %chain0.0.digit1.chunk0.word
  %total.2 = add <16 x i32> %total.1, %chain0.0.digit1.chunk1.word.1
  %shifted.2 = shl <16 x i32> %total.2, splat (i32 8)
  %total.3 = add <16 x i32> %shifted.2, %chain0.0.digit2.chunk0.word
  %total.4 = add <16 x i32> %total.3, %chain0.0.digit2.chunk1.word.1
  %whole_sum_at = getelementptr %Unit, ptr %unit_at, i64 0, i32 4
  %whole_sum = load i32, ptr %whole_sum_at, align 4
  %whole_sum_lane = insertelement <16 x i32> poison, i32 %whole_sum, i64 0
  %whole_sum_lanes = shufflevector <16 x i32> %whole_sum_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %total.5 = add <16 x i32> %total.4, %whole_sum_lanes
  %sum = sitofp <16 x i32> %total.5 to <16 x float>
  ; times scale and step: a step is a power of two, its lift adds to exponents
  %scale_bits = bitcast <16 x float> %block_scale to <16 x i32>
  %lift_at = getelementptr %Unit, ptr %unit_at, i64 0, i32 0
  %lift = load i32, ptr %lift_at, align 4
  %lift_lane = insertelement <16 x i32> poison, i32 %lift, i64 0
  %lift_lanes = shufflevector <16 x i32> %lift_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %lifted = add <16 x i32> %scale_bits, %lift_lanes
  %scale_step = bitcast <16 x i32> %lifted to <16 x float>
  %total0.0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %scale_step, <16 x float> %sum, <16 x float> %total0.0.block)
  %block.next = add i64 %block, 1
  br label %block.head, !llvm.loop !0
block.done:
  %slab.next = add i64 %slab, 1
  br label %slab.head
slab.done:
  ; the stretch's sums are added with what rounding takes from them
  call void @add_to_long(<16 x float> %total0.0.slab, ptr %long_sums)
  %stretch.next = add i64 %stretch, 32
  br label %stretch.head
stretch.done:
  %total.6 = load <16 x float>, ptr %long_sums, align 64
  %lost_at = getelementptr <16 x float>, ptr %long_sums, i64 1
  %lost = load <16 x float>, ptr %lost_at, align 64
  %magnitude = call <16 x float> @llvm.fabs.v16f32(<16 x float> %lost)
  %finite = fcmp olt <16 x float> %magnitude, splat (float 0x7FF0000000000000)  ; not Inf − Inf
  %kept = select <16 x i1> %finite, <16 x float> %lost, <16 x float> zeroinitializer
  %total.7 = fadd <16 x float> %total.6, %kept
  store <16 x float> %total.7, ptr %tile, align 64
  ; times the row's smallest step; a scale of 0 plus a lift is tiny, and becomes 0
  %end_at = getelementptr %Unit, ptr %units, i64 128
  %smallest_step_at = getelementptr %RowEnd, ptr %end_at, i64 0, i32 1
  %smallest_step = load float, ptr %smallest_step_at, align 4
  %smallest_step_lane = insertelement <16 x float> poison, float %smallest_step, i64 0
  %smallest_step_lanes = shufflevector <16 x float> %smallest_step_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %sums = load <16 x float>, ptr %tile, align 64
  %magnitude.1 = call <16 x float> @llvm.fabs.v16f32(<16 x float> %sums)
  %some = fcmp oge <16 x float> %magnitude.1, splat (float 0x3E60000000000000)  ; 2^-25
  %kept.1 = select <16 x i1> %some, <16 x float> %sums, <16 x float> zeroinitializer
  %scaled = fmul <16 x float> %kept.1, %smallest_step_lanes
  store <16 x float> %scaled, ptr %tile, align 64
  %rough_count_at = getelementptr %RowEnd, ptr %end_at, i64 0, i32 0
  %rough_count = load i32, ptr %rough_count_at, align 4
  %none = icmp eq i32 %rough_count, 0
  br i1 %none, label %done, label %add_rough
add_rough:
  call void @q4_0_k4096_rough(ptr %x, ptr %end_at, ptr %w0, ptr %tile)
  br label %done
done:
  ret void
}

; 16 of 64 columns for rows %first … %end: 1 product and the epilogue.
define internal void @q4jit_product.section0(ptr %args, i64 %task, i64 %first, i64 %end) #0 {
entry:
  %w_slot = getelementptr %Slots, ptr %args, i64 0, i32 3
  %w = load ptr, ptr %w_slot, align 8
  %prologue_slot = getelementptr %Slots, ptr %args, i64 0, i32 5
  %prologue = load ptr, ptr %prologue_slot, align 8
  %digits_slot = getelementptr %Slots, ptr %args, i64 0, i32 7
  %digits = load ptr, ptr %digits_slot, align 8
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
  %digits_offset = mul i64 %tile_row, 16960
  %digits_at = getelementptr i8, ptr %digits, i64 %digits_offset
  call void @q4_0_k4096_rows1_digits3(ptr %x_at, ptr %digits_at, ptr %w_at, ptr %tile)
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
declare <16 x float> @llvm.rint.v16f32(<16 x float>)
declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)
declare <16 x i32> @llvm.smax.v16i32(<16 x i32>, <16 x i32>)
declare <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32>, <64 x i8>, <64 x i8>)
declare float @llvm.sqrt.f32(float)
declare float @llvm.vector.reduce.fadd.v16f32(float, <16 x float>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare i32 @llvm.smax.i32(i32, i32)
declare i32 @llvm.smin.i32(i32, i32)
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
declare i32 @llvm.vector.reduce.smax.v16i32(<16 x i32>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

attributes #0 = { nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }
attributes #1 = { alwaysinline nounwind }

!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}
