; product for cpu:x86-64-v4+avx512vnni, M = 1, 3 digits by vpdpbusd, made by q4jit
; rows:
;   v0 = x
; 64 columns:
;   v1 = v0 @ w    Q4_0 [4096, 64]
;   output0 = v1
; args: 0 pool, 1 m, 2 x, 3 w, 4 output0, 5 prologue, 6 exponent, 7 digits

target triple = "x86_64-unknown-linux-gnu"

; Bring the exponent of x's largest element into -40 … 96, where
; most lie already: sums of products with quants then neither overflow nor go denormal.
define internal void @normalise(ptr %x, i64 %k, <16 x float> %largest, ptr %scale) #0 {
entry:
  %max = call float @llvm.vector.reduce.fmax.v16f32(<16 x float> %largest)
  %tiny = fcmp olt float %max, 0x39B0000000000000
  %lifted = fmul float %max, 18446744073709551616.0
  %seen = select i1 %tiny, float %lifted, float %max
  %lift = select i1 %tiny, i32 191, i32 127
  %bits = bitcast float %seen to i32
  %field = lshr i32 %bits, 23
  %exponent = sub i32 %field, %lift
  %low = call i32 @llvm.smax.i32(i32 %exponent, i32 -40)
  %wanted = call i32 @llvm.smin.i32(i32 %low, i32 96)
  %shift = sub i32 %wanted, %exponent
  %zero = fcmp oeq float %max, 0.0
  %inside = icmp eq i32 %shift, 0
  %nothing = or i1 %zero, %inside
  br i1 %nothing, label %keep, label %rescale
keep:
  store float 1.0, ptr %scale, align 4
  ret void
rescale:
  %up = add i32 %shift, 127
  %bits.1 = shl i32 %up, 23
  %power = bitcast i32 %bits.1 to float
  %down = sub i32 127, %shift
  %bits.2 = shl i32 %down, 23
  %power.1 = bitcast i32 %bits.2 to float
  store float %power.1, ptr %scale, align 4
  %lane = insertelement <16 x float> poison, float %power, i64 0
  %splat = shufflevector <16 x float> %lane, <16 x float> poison, <16 x i32> zeroinitializer
  br label %c.head
c.head:
  %c = phi i64 [ 0, %rescale ], [ %c.next, %c.body ]
  %c.more = icmp slt i64 %c, %k
  br i1 %c.more, label %c.body, label %c.done
c.body:
  %at = getelementptr float, ptr %x, i64 %c
  %v = load <16 x float>, ptr %at, align 4
  %scaled = fmul <16 x float> %v, %splat
  store <16 x float> %scaled, ptr %at, align 4
  %c.next = add i64 %c, 16
  br label %c.head
c.done:
  ret void
}

; x as integers of 24 bits in units of 32 that share a step.
define internal void @digits(ptr noalias %x, ptr noalias %units, i64 %count) #0 {
entry:
  %end_off = mul i64 %count, 128
  %end = getelementptr i8, ptr %units, i64 %end_off
  %list = getelementptr i8, ptr %end, i64 8
  ; the mean magnitude of what is not 0 or beyond f32
  %elements = mul i64 %count, 32
  br label %i.head
i.head:
  %i = phi i64 [ 0, %entry ], [ %i.next, %i.body ]
  %number.i = phi <16 x float> [ zeroinitializer, %entry ], [ %total, %i.body ]
  %sum.i = phi <16 x float> [ zeroinitializer, %entry ], [ %total.1, %i.body ]
  %i.more = icmp slt i64 %i, %elements
  br i1 %i.more, label %i.body, label %i.done
i.body:
  %at = getelementptr float, ptr %x, i64 %i
  %x.1 = load <16 x float>, ptr %at, align 4
  %size = call <16 x float> @llvm.fabs.v16f32(<16 x float> %x.1)
  %some = fcmp ogt <16 x float> %size, zeroinitializer
  %finite = fcmp olt <16 x float> %size, splat (float 0x7FF0000000000000)
  %counted = and <16 x i1> %some, %finite
  %kept = select <16 x i1> %counted, <16 x float> splat (float 1.0), <16 x float> zeroinitializer
  %total = fadd <16 x float> %number.i, %kept
  %kept.1 = select <16 x i1> %counted, <16 x float> %size, <16 x float> zeroinitializer
  %total.1 = fadd <16 x float> %sum.i, %kept.1
  %i.next = add i64 %i, 16
  br label %i.head
i.done:
  %sum = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %sum.i)
  %sum.1 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %number.i)
  %mean = fdiv float %sum, %sum.1
  %usual = fmul float %mean, 2.0
  ; the usual energy, and the largest magnitude of each unit
  %lane = insertelement <16 x float> poison, float %usual, i64 0
  %splat = shufflevector <16 x float> %lane, <16 x float> poison, <16 x i32> zeroinitializer
  br label %unit.head
unit.head:
  %unit = phi i64 [ 0, %i.done ], [ %unit.next, %unit.body ]
  %energy.unit = phi <16 x float> [ zeroinitializer, %i.done ], [ %total.3, %unit.body ]
  %tops.unit = phi float [ 0.0, %i.done ], [ %tops, %unit.body ]
  %largest.unit = phi i32 [ 0, %i.done ], [ %largest, %unit.body ]
  %unit.more = icmp slt i64 %unit, %count
  br i1 %unit.more, label %unit.body, label %unit.done
unit.body:
  %x_off = mul i64 %unit, 32
  %x_at = getelementptr float, ptr %x, i64 %x_off
  %x.2 = load <16 x float>, ptr %x_at, align 4
  %at.1 = getelementptr float, ptr %x_at, i64 16
  %x.3 = load <16 x float>, ptr %at.1, align 4
  %bits = bitcast <16 x float> %x.2 to <16 x i32>
  %size.1 = and <16 x i32> %bits, splat (i32 2147483647)
  %magnitude = bitcast <16 x i32> %size.1 to <16 x float>
  %inside = fcmp ole <16 x float> %magnitude, %splat
  %square = fmul <16 x float> %x.2, %x.2
  %kept.2 = select <16 x i1> %inside, <16 x float> %square, <16 x float> zeroinitializer
  %total.2 = fadd <16 x float> %energy.unit, %kept.2
  %bits.1 = bitcast <16 x float> %x.3 to <16 x i32>
  %size.2 = and <16 x i32> %bits.1, splat (i32 2147483647)
  %magnitude.1 = bitcast <16 x i32> %size.2 to <16 x float>
  %inside.1 = fcmp ole <16 x float> %magnitude.1, %splat
  %square.1 = fmul <16 x float> %x.3, %x.3
  %kept.3 = select <16 x i1> %inside.1, <16 x float> %square.1, <16 x float> zeroinitializer
  %total.3 = fadd <16 x float> %total.2, %kept.3
  ; magnitudes compare as integers do, and Inf and NaN are the largest
  %larger = call <16 x i32> @llvm.smax.v16i32(<16 x i32> %size.1, <16 x i32> %size.2)
  %top = call i32 @llvm.vector.reduce.smax.v16i32(<16 x i32> %larger)
  %unit_off = mul i64 %unit, 128
  %at.2 = getelementptr i8, ptr %units, i64 %unit_off
  store i32 %top, ptr %at.2, align 4
  %finite.1 = icmp slt i32 %top, 2139095040
  %counted.1 = select i1 %finite.1, i32 %top, i32 0
  %value = bitcast i32 %counted.1 to float
  %square.2 = fmul float %value, %value
  %tops = fadd float %tops.unit, %square.2
  %largest = call i32 @llvm.smax.i32(i32 %largest.unit, i32 %counted.1)
  %unit.next = add i64 %unit, 1
  br label %unit.head
unit.done:
  %sum.2 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %energy.unit)
  %number = sitofp i64 %count to float
  %each = fdiv float %sum.2, %number
  %share = fmul float %each, 0x40299999A0000000
  %root = call float @llvm.sqrt.f32(float %share)
  %limit = bitcast float %root to i32
  %most = fmul float %sum.2, 0x40399999A0000000
  %few = fcmp ole float %tops.unit, %most
  %limit.1 = select i1 %few, i32 2139095039, i32 %limit
  %limit.2 = call i32 @llvm.smin.i32(i32 %limit.1, i32 2139095039)
  %largest.1 = call i32 @llvm.smin.i32(i32 %largest.unit, i32 %limit.2)
  %tiny = icmp slt i32 %largest.1, 662700032
  %limit.3 = select i1 %tiny, i32 0, i32 %limit.2
  %largest.2 = call i32 @llvm.smax.i32(i32 %largest.1, i32 662700032)
  %size.3 = bitcast i32 %largest.2 to float
  %most.1 = fdiv float 8355700.0, %size.3
  %most_bits = bitcast float %most.1 to i32
  %power = and i32 %most_bits, 2139095040
  br label %unit.1.head
unit.1.head:
  %unit.1 = phi i64 [ 0, %unit.done ], [ %unit.1.next, %unit.1.body ]
  %rough.unit.1 = phi i64 [ 0, %unit.done ], [ %rough, %unit.1.body ]
  %unit.1.more = icmp slt i64 %unit.1, %count
  br i1 %unit.1.more, label %unit.1.body, label %unit.1.done
unit.1.body:
  %unit_off.1 = mul i64 %unit.1, 128
  %unit_at = getelementptr i8, ptr %units, i64 %unit_off.1
  %top.1 = load i32, ptr %unit_at, align 4
  %high = icmp sgt i32 %top.1, %limit.3
  %least = sub i32 %largest.2, 419430400
  %some.1 = icmp ne i32 %top.1, 0
  %under = icmp slt i32 %top.1, %least
  %low = and i1 %some.1, %under
  %is_rough = or i1 %high, %low
  %held = call i32 @llvm.smax.i32(i32 %top.1, i32 %least)
  %held.1 = call i32 @llvm.smin.i32(i32 %held, i32 %largest.2)
  %size.4 = bitcast i32 %held.1 to float
  %most.2 = fdiv float 8355700.0, %size.4
  %most_bits.1 = bitcast float %most.2 to i32
  %power.1 = and i32 %most_bits.1, 2139095040
  %inverse = bitcast i32 %power.1 to float
  %below = sub i32 %power.1, %power
  %lift = sub i32 419430400, %below
  %lift.1 = select i1 %is_rough, i32 0, i32 %lift
  %x_off.1 = mul i64 %unit.1, 32
  %x_at.1 = getelementptr float, ptr %x, i64 %x_off.1
  %x.4 = load <16 x float>, ptr %x_at.1, align 4
  %at.3 = getelementptr float, ptr %x_at.1, i64 16
  %x.5 = load <16 x float>, ptr %at.3, align 4
  %lane.1 = insertelement <16 x float> poison, float %inverse, i64 0
  %splat.1 = shufflevector <16 x float> %lane.1, <16 x float> poison, <16 x i32> zeroinitializer
  %scaled = fmul <16 x float> %x.4, %splat.1
  %whole = call <16 x float> @llvm.rint.v16f32(<16 x float> %scaled)
  %X = fptosi <16 x float> %whole to <16 x i32>
  %X.1 = select i1 %is_rough, <16 x i32> zeroinitializer, <16 x i32> %X
  %lane.2 = insertelement <16 x float> poison, float %inverse, i64 0
  %splat.2 = shufflevector <16 x float> %lane.2, <16 x float> poison, <16 x i32> zeroinitializer
  %scaled.1 = fmul <16 x float> %x.5, %splat.2
  %whole.1 = call <16 x float> @llvm.rint.v16f32(<16 x float> %scaled.1)
  %X.2 = fptosi <16 x float> %whole.1 to <16 x i32>
  %X.3 = select i1 %is_rough, <16 x i32> zeroinitializer, <16 x i32> %X.2
  store i32 %lift.1, ptr %unit_at, align 4
  %both = add <16 x i32> %X.1, %X.3
  %sum.3 = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %both)
  %many = mul i32 %sum.3, -8
  %at.4 = getelementptr i8, ptr %unit_at, i64 24
  store i32 %many, ptr %at.4, align 4
  %carried = add <16 x i32> %X.1, splat (i32 8421504)
  %bits.2 = lshr <16 x i32> %carried, splat (i32 16)
  %low.1 = trunc <16 x i32> %bits.2 to <16 x i8>
  %digit = xor <16 x i8> %low.1, splat (i8 -128)
  %at.5 = getelementptr i8, ptr %unit_at, i64 32
  store <16 x i8> %digit, ptr %at.5, align 16
  %carried.1 = add <16 x i32> %X.3, splat (i32 8421504)
  %bits.3 = lshr <16 x i32> %carried.1, splat (i32 16)
  %low.2 = trunc <16 x i32> %bits.3 to <16 x i8>
  %digit.1 = xor <16 x i8> %low.2, splat (i8 -128)
  %at.6 = getelementptr i8, ptr %unit_at, i64 48
  store <16 x i8> %digit.1, ptr %at.6, align 16
  %carried.2 = add <16 x i32> %X.1, splat (i32 8421504)
  %bits.4 = lshr <16 x i32> %carried.2, splat (i32 8)
  %low.3 = trunc <16 x i32> %bits.4 to <16 x i8>
  %digit.2 = xor <16 x i8> %low.3, splat (i8 -128)
  %at.7 = getelementptr i8, ptr %unit_at, i64 64
  store <16 x i8> %digit.2, ptr %at.7, align 16
  %carried.3 = add <16 x i32> %X.3, splat (i32 8421504)
  %bits.5 = lshr <16 x i32> %carried.3, splat (i32 8)
  %low.4 = trunc <16 x i32> %bits.5 to <16 x i8>
  %digit.3 = xor <16 x i8> %low.4, splat (i8 -128)
  %at.8 = getelementptr i8, ptr %unit_at, i64 80
  store <16 x i8> %digit.3, ptr %at.8, align 16
  %carried.4 = add <16 x i32> %X.1, splat (i32 8421504)
  %low.5 = trunc <16 x i32> %carried.4 to <16 x i8>
  %digit.4 = xor <16 x i8> %low.5, splat (i8 -128)
  %at.9 = getelementptr i8, ptr %unit_at, i64 96
  store <16 x i8> %digit.4, ptr %at.9, align 16
  %carried.5 = add <16 x i32> %X.3, splat (i32 8421504)
  %low.6 = trunc <16 x i32> %carried.5 to <16 x i8>
  %digit.5 = xor <16 x i8> %low.6, splat (i8 -128)
  %at.10 = getelementptr i8, ptr %unit_at, i64 112
  store <16 x i8> %digit.5, ptr %at.10, align 16
  ; the list has room: it is never longer than the units so far
  %number.1 = trunc i64 %unit.1 to i32
  %at.11 = getelementptr i32, ptr %list, i64 %rough.unit.1
  store i32 %number.1, ptr %at.11, align 4
  %more = zext i1 %is_rough to i64
  %rough = add i64 %rough.unit.1, %more
  %unit.1.next = add i64 %unit.1, 1
  br label %unit.1.head
unit.1.done:
  %count.1 = trunc i64 %rough.unit.1 to i32
  store i32 %count.1, ptr %end, align 4
  ; the smallest step is the inverse of a power of two
  %step = sub i32 1711276032, %power
  %at.12 = getelementptr i8, ptr %end, i64 4
  store i32 %step, ptr %at.12, align 4
  ret void
}

; One row before the products: x, and what the columns phase needs of it.
define internal void @q4jit_product.row(ptr %args, i64 %row) #0 {
entry:
  %prologue.at = getelementptr i64, ptr %args, i64 5
  %prologue = load ptr, ptr %prologue.at, align 8
  %x.at = getelementptr i64, ptr %args, i64 2
  %x = load ptr, ptr %x.at, align 8
  %exponent.at = getelementptr i64, ptr %args, i64 6
  %exponent = load ptr, ptr %exponent.at, align 8
  %digits.at = getelementptr i64, ptr %args, i64 7
  %digits = load ptr, ptr %digits.at, align 8
  %x_at = mul i64 %row, 4096
  %x_row = getelementptr float, ptr %prologue, i64 %x_at
  ; x, and its largest finite magnitude
  br label %c.head
c.head:
  %c = phi i64 [ 0, %entry ], [ %c.next, %c.body ]
  %largest.c = phi <16 x float> [ zeroinitializer, %entry ], [ %largest, %c.body ]
  %c.more = icmp slt i64 %c, 4096
  br i1 %c.more, label %c.body, label %c.done
c.body:
  %at = getelementptr float, ptr %x, i64 %c
  %v = load <16 x float>, ptr %at, align 4
  %at.1 = getelementptr float, ptr %x_row, i64 %c
  store <16 x float> %v, ptr %at.1, align 4
  %size = call <16 x float> @llvm.fabs.v16f32(<16 x float> %v)
  %finite = fcmp olt <16 x float> %size, splat (float 0x7FF0000000000000)
  %larger = fcmp ogt <16 x float> %size, %largest.c
  %both = and <16 x i1> %finite, %larger
  %largest = select <16 x i1> %both, <16 x float> %size, <16 x float> %largest.c
  %c.next = add i64 %c, 16
  br label %c.head
c.done:
  %at.2 = getelementptr float, ptr %exponent, i64 %row
  call void @normalise(ptr %x_row, i64 4096, <16 x float> %largest.c, ptr %at.2)
  %digits_off = mul i64 %row, 16960
  %digits_at = getelementptr i8, ptr %digits, i64 %digits_off
  call void @digits(ptr %x_row, ptr %digits_at, i64 128)
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
define internal <16 x float> @load_half_v16f32(ptr %p) #1 {
entry:
  %half = load <16 x half>, ptr %p, align 2
  %v = fpext <16 x half> %half to <16 x float>
  ret <16 x float> %v
}

; vpdpbusd: four products of bytes in each of 16 lanes.
define internal <16 x i32> @dot4(<16 x i32> %sum, <16 x i32> %quants, <16 x i32> %x) #1 {
entry:
  %q8 = bitcast <16 x i32> %quants to <64 x i8>
  %x8 = bitcast <16 x i32> %x to <64 x i8>
  %s = call <16 x i32> @llvm.x86.avx512.vpdpbusd.512(<16 x i32> %sum, <64 x i8> %q8, <64 x i8> %x8)
  ret <16 x i32> %s
}

; Q4_0: bits to q − zero.
define internal <16 x float> @quant_q4_0(<16 x i32> %bits0) #1 {
entry:
  %q = call <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float> <float -8.0, float -7.0, float -6.0, float -5.0, float -4.0, float -3.0, float -2.0, float -1.0, float 0.0, float 1.0, float 2.0, float 3.0, float 4.0, float 5.0, float 6.0, float 7.0>, <16 x i32> %bits0)
  ret <16 x float> %q
}

; 16 columns times the rough units of a row of x, in floats, added to 16 sums.
define internal void @q4_0_k4096_rough(ptr noalias %x, ptr noalias %end, ptr noalias %w, ptr noalias %sums) #0 {
entry:
  %total = load <16 x float>, ptr %sums, align 64
  %count32 = load i32, ptr %end, align 4
  %list = getelementptr i8, ptr %end, i64 8
  %count = sext i32 %count32 to i64
  br label %i.head
i.head:
  %i = phi i64 [ 0, %entry ], [ %i.next, %chunk.done ]
  %total.i = phi <16 x float> [ %total, %entry ], [ %total.1, %chunk.done ]
  %i.more = icmp slt i64 %i, %count
  br i1 %i.more, label %i.body, label %i.done
i.body:
  %at = getelementptr i32, ptr %list, i64 %i
  %unit32 = load i32, ptr %at, align 4
  %unit = sext i32 %unit32 to i64
  %run = udiv i64 %unit, 2
  %within = urem i64 %unit, 2
  %w_off = mul i64 %run, 576
  %tile_at = getelementptr i8, ptr %w, i64 %w_off
  %k = mul i64 %unit, 32
  %d_at = mul i64 %within, 32
  %d = getelementptr i8, ptr %tile_at, i64 %d_at
  %d16 = call <16 x float> @load_half_v16f32(ptr %d)
  br label %chunk.head
chunk.head:
  %chunk = phi i64 [ 0, %i.body ], [ %chunk.next, %word.done ]
  %part.chunk = phi <16 x float> [ zeroinitializer, %i.body ], [ %part.word, %word.done ]
  %chunk.more = icmp slt i64 %chunk, 2
  br i1 %chunk.more, label %chunk.body, label %chunk.done
chunk.body:
  %pile32 = trunc i64 %chunk to i32
  %shift = mul i32 %pile32, 4
  %quants0_at = mul i64 %within, 256
  %quants0_at.1 = add i64 %quants0_at, 64
  %quants0 = getelementptr i8, ptr %tile_at, i64 %quants0_at.1
  br label %word.head
word.head:
  %word = phi i64 [ 0, %chunk.body ], [ %word.next, %word.body ]
  %part.word = phi <16 x float> [ %part.chunk, %chunk.body ], [ %part.3, %word.body ]
  %word.more = icmp slt i64 %word, 4
  br i1 %word.more, label %word.body, label %word.done
word.body:
  %k.1 = mul i64 %chunk, 16
  %k.2 = mul i64 %word, 4
  %k.3 = add i64 %k, %k.1
  %k.4 = add i64 %k.3, %k.2
  %word_at = getelementptr <16 x i32>, ptr %quants0, i64 %word
  %bits = load <16 x i32>, ptr %word_at, align 32
  %lane = insertelement <16 x i32> poison, i32 %shift, i64 0
  %splat = shufflevector <16 x i32> %lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %bits.1 = lshr <16 x i32> %bits, %splat
  %q0 = call <16 x float> @quant_q4_0(<16 x i32> %bits.1)
  %bits.2 = lshr <16 x i32> %bits.1, splat (i32 8)
  %q1 = call <16 x float> @quant_q4_0(<16 x i32> %bits.2)
  %bits.3 = lshr <16 x i32> %bits.1, splat (i32 16)
  %q2 = call <16 x float> @quant_q4_0(<16 x i32> %bits.3)
  %bits.4 = lshr <16 x i32> %bits.1, splat (i32 24)
  %q3 = call <16 x float> @quant_q4_0(<16 x i32> %bits.4)
  %xk = getelementptr float, ptr %x, i64 %k.4
  %x0 = load float, ptr %xk, align 4
  %lane.1 = insertelement <16 x float> poison, float %x0, i64 0
  %splat.1 = shufflevector <16 x float> %lane.1, <16 x float> poison, <16 x i32> zeroinitializer
  %part = call <16 x float> @llvm.fma.v16f32(<16 x float> %splat.1, <16 x float> %q0, <16 x float> %part.word)
  %k.5 = add i64 %k.4, 1
  %xk.1 = getelementptr float, ptr %x, i64 %k.5
  %x0.1 = load float, ptr %xk.1, align 4
  %lane.2 = insertelement <16 x float> poison, float %x0.1, i64 0
  %splat.2 = shufflevector <16 x float> %lane.2, <16 x float> poison, <16 x i32> zeroinitializer
  %part.1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %splat.2, <16 x float> %q1, <16 x float> %part)
  %k.6 = add i64 %k.4, 2
  %xk.2 = getelementptr float, ptr %x, i64 %k.6
  %x0.2 = load float, ptr %xk.2, align 4
  %lane.3 = insertelement <16 x float> poison, float %x0.2, i64 0
  %splat.3 = shufflevector <16 x float> %lane.3, <16 x float> poison, <16 x i32> zeroinitializer
  %part.2 = call <16 x float> @llvm.fma.v16f32(<16 x float> %splat.3, <16 x float> %q2, <16 x float> %part.1)
  %k.7 = add i64 %k.4, 3
  %xk.3 = getelementptr float, ptr %x, i64 %k.7
  %x0.3 = load float, ptr %xk.3, align 4
  %lane.4 = insertelement <16 x float> poison, float %x0.3, i64 0
  %splat.4 = shufflevector <16 x float> %lane.4, <16 x float> poison, <16 x i32> zeroinitializer
  %part.3 = call <16 x float> @llvm.fma.v16f32(<16 x float> %splat.4, <16 x float> %q3, <16 x float> %part.2)
  %word.next = add i64 %word, 1
  br label %word.head, !llvm.loop !0
word.done:
  %chunk.next = add i64 %chunk, 1
  br label %chunk.head, !llvm.loop !0
chunk.done:
  %total.1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %d16, <16 x float> %part.chunk, <16 x float> %total.i)
  %i.next = add i64 %i, 1
  br label %i.head
i.done:
  store <16 x float> %total.i, ptr %sums, align 64
  ret void
}

; 16 columns of Q4_0, one a lane, times 1 row of x in 3 digit(s) of int8; K = 4096.
; vpdpbusd multiplies four quants with four digits in each lane.
define internal void @q4_0_k4096_rows1_digits3(ptr noalias %x, ptr noalias %units, ptr noalias %w0, ptr noalias %tile) #0 {
entry:
  br label %tile.1.head
tile.1.head:
  %tile.1 = phi i64 [ 0, %entry ], [ %tile.1.next, %block.done ]
  %acc0.0.tile.1 = phi <16 x float> [ zeroinitializer, %entry ], [ %acc0.0.block, %block.done ]
  %tile.1.more = icmp slt i64 %tile.1, 64
  br i1 %tile.1.more, label %tile.1.body, label %tile.1.done
tile.1.body:
  %offset = mul i64 %tile.1, 576
  %tile_at = getelementptr i8, ptr %w0, i64 %offset
  br label %block.head
block.head:
  %block = phi i64 [ 0, %tile.1.body ], [ %block.next, %word.4.done ]
  %acc0.0.block = phi <16 x float> [ %acc0.0.tile.1, %tile.1.body ], [ %acc0.0, %word.4.done ]
  %block.more = icmp slt i64 %block, 2
  br i1 %block.more, label %block.body, label %block.done
block.body:
  %unit = mul i64 %tile.1, 2
  %unit.1 = add i64 %unit, %block
  %d_at = mul i64 %block, 32
  %d = getelementptr i8, ptr %tile_at, i64 %d_at
  %d16 = call <16 x float> @load_half_v16f32(ptr %d)
  ; the same place 8192 bytes ahead
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
  %ahead_at = getelementptr i8, ptr %tile_at, i64 %ahead.3
  call void @llvm.prefetch.p0(ptr %ahead_at, i32 0, i32 2, i32 1) ; read, second level
  %line.next = add i64 %line, 1
  br label %line.head, !llvm.loop !0
line.done:
  %at = mul i64 %unit.1, 128
  %unit_at = getelementptr i8, ptr %units, i64 %at
  %quants0_at = mul i64 %block, 256
  %quants0_at.1 = add i64 %quants0_at, 64
  %quants0 = getelementptr i8, ptr %tile_at, i64 %quants0_at.1
  br label %word.head
word.head:
  %word = phi i64 [ 0, %line.done ], [ %word.next, %word.body ]
  %s0.0.0.0.word = phi <16 x i32> [ zeroinitializer, %line.done ], [ %s, %word.body ]
  %s0.0.1.0.word = phi <16 x i32> [ zeroinitializer, %line.done ], [ %s.1, %word.body ]
  %s0.0.2.0.word = phi <16 x i32> [ zeroinitializer, %line.done ], [ %s.2, %word.body ]
  %word.more = icmp slt i64 %word, 4
  br i1 %word.more, label %word.body, label %word.done
word.body:
  %word_at = getelementptr <16 x i32>, ptr %quants0, i64 %word
  %bits = load <16 x i32>, ptr %word_at, align 32
  %field = and <16 x i32> %bits, splat (i32 252645135)
  %x_at = mul i64 %word, 4
  %x_at.1 = add i64 %x_at, 32
  %at.1 = getelementptr i8, ptr %unit_at, i64 %x_at.1
  %word.1 = load i32, ptr %at.1, align 4
  %lane = insertelement <16 x i32> poison, i32 %word.1, i64 0
  %splat = shufflevector <16 x i32> %lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %s = call <16 x i32> @dot4(<16 x i32> %s0.0.0.0.word, <16 x i32> %field, <16 x i32> %splat)
  %x_at.2 = mul i64 %word, 4
  %x_at.3 = add i64 %x_at.2, 64
  %at.2 = getelementptr i8, ptr %unit_at, i64 %x_at.3
  %word.2 = load i32, ptr %at.2, align 4
  %lane.1 = insertelement <16 x i32> poison, i32 %word.2, i64 0
  %splat.1 = shufflevector <16 x i32> %lane.1, <16 x i32> poison, <16 x i32> zeroinitializer
  %s.1 = call <16 x i32> @dot4(<16 x i32> %s0.0.1.0.word, <16 x i32> %field, <16 x i32> %splat.1)
  %x_at.4 = mul i64 %word, 4
  %x_at.5 = add i64 %x_at.4, 96
  %at.3 = getelementptr i8, ptr %unit_at, i64 %x_at.5
  %word.3 = load i32, ptr %at.3, align 4
  %lane.2 = insertelement <16 x i32> poison, i32 %word.3, i64 0
  %splat.2 = shufflevector <16 x i32> %lane.2, <16 x i32> poison, <16 x i32> zeroinitializer
  %s.2 = call <16 x i32> @dot4(<16 x i32> %s0.0.2.0.word, <16 x i32> %field, <16 x i32> %splat.2)
  %word.next = add i64 %word, 1
  br label %word.head, !llvm.loop !0
word.done:
  %quants0_at.2 = mul i64 %block, 256
  %quants0_at.3 = add i64 %quants0_at.2, 64
  %quants0.1 = getelementptr i8, ptr %tile_at, i64 %quants0_at.3
  br label %word.4.head
word.4.head:
  %word.4 = phi i64 [ 0, %word.done ], [ %word.4.next, %word.4.body ]
  %s0.0.0.1.word.4 = phi <16 x i32> [ zeroinitializer, %word.done ], [ %s.3, %word.4.body ]
  %s0.0.1.1.word.4 = phi <16 x i32> [ zeroinitializer, %word.done ], [ %s.4, %word.4.body ]
  %s0.0.2.1.word.4 = phi <16 x i32> [ zeroinitializer, %word.done ], [ %s.5, %word.4.body ]
  %word.4.more = icmp slt i64 %word.4, 4
  br i1 %word.4.more, label %word.4.body, label %word.4.done
word.4.body:
  %word_at.1 = getelementptr <16 x i32>, ptr %quants0.1, i64 %word.4
  %bits.1 = load <16 x i32>, ptr %word_at.1, align 32
  %bits.2 = lshr <16 x i32> %bits.1, splat (i32 4)
  %field.1 = and <16 x i32> %bits.2, splat (i32 252645135)
  %x_at.6 = mul i64 %word.4, 4
  %x_at.7 = add i64 %x_at.6, 48
  %at.4 = getelementptr i8, ptr %unit_at, i64 %x_at.7
  %word.5 = load i32, ptr %at.4, align 4
  %lane.3 = insertelement <16 x i32> poison, i32 %word.5, i64 0
  %splat.3 = shufflevector <16 x i32> %lane.3, <16 x i32> poison, <16 x i32> zeroinitializer
  %s.3 = call <16 x i32> @dot4(<16 x i32> %s0.0.0.1.word.4, <16 x i32> %field.1, <16 x i32> %splat.3)
  %x_at.8 = mul i64 %word.4, 4
  %x_at.9 = add i64 %x_at.8, 80
  %at.5 = getelementptr i8, ptr %unit_at, i64 %x_at.9
  %word.6 = load i32, ptr %at.5, align 4
  %lane.4 = insertelement <16 x i32> poison, i32 %word.6, i64 0
  %splat.4 = shufflevector <16 x i32> %lane.4, <16 x i32> poison, <16 x i32> zeroinitializer
  %s.4 = call <16 x i32> @dot4(<16 x i32> %s0.0.1.1.word.4, <16 x i32> %field.1, <16 x i32> %splat.4)
  %x_at.10 = mul i64 %word.4, 4
  %x_at.11 = add i64 %x_at.10, 112
  %at.6 = getelementptr i8, ptr %unit_at, i64 %x_at.11
  %word.7 = load i32, ptr %at.6, align 4
  %lane.5 = insertelement <16 x i32> poison, i32 %word.7, i64 0
  %splat.5 = shufflevector <16 x i32> %lane.5, <16 x i32> poison, <16 x i32> zeroinitializer
  %s.5 = call <16 x i32> @dot4(<16 x i32> %s0.0.2.1.word.4, <16 x i32> %field.1, <16 x i32> %splat.5)
  %word.4.next = add i64 %word.4, 1
  br label %word.4.head, !llvm.loop !0
word.4.done:
  %total = add <16 x i32> %s0.0.0.0.word, %s0.0.0.1.word.4
  %up = shl <16 x i32> %total, splat (i32 8)
  %total.1 = add <16 x i32> %up, %s0.0.1.0.word
  %total.2 = add <16 x i32> %total.1, %s0.0.1.1.word.4
  %up.1 = shl <16 x i32> %total.2, splat (i32 8)
  %total.3 = add <16 x i32> %up.1, %s0.0.2.0.word
  %total.4 = add <16 x i32> %total.3, %s0.0.2.1.word.4
  %at.7 = getelementptr i8, ptr %unit_at, i64 24
  %word.8 = load i32, ptr %at.7, align 4
  %lane.6 = insertelement <16 x i32> poison, i32 %word.8, i64 0
  %splat.6 = shufflevector <16 x i32> %lane.6, <16 x i32> poison, <16 x i32> zeroinitializer
  %total.5 = add <16 x i32> %total.4, %splat.6
  %sum = sitofp <16 x i32> %total.5 to <16 x float>
  ; a step is a power of two: its exponent goes to the scale
  %d_bits = bitcast <16 x float> %d16 to <16 x i32>
  %word.9 = load i32, ptr %unit_at, align 4
  %lane.7 = insertelement <16 x i32> poison, i32 %word.9, i64 0
  %splat.7 = shufflevector <16 x i32> %lane.7, <16 x i32> poison, <16 x i32> zeroinitializer
  %up.2 = add <16 x i32> %d_bits, %splat.7
  %d_step = bitcast <16 x i32> %up.2 to <16 x float>
  %acc0.0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %d_step, <16 x float> %sum, <16 x float> %acc0.0.block)
  %block.next = add i64 %block, 1
  br label %block.head, !llvm.loop !0
block.done:
  %tile.1.next = add i64 %tile.1, 1
  br label %tile.1.head
tile.1.done:
  store <16 x float> %acc0.0.tile.1, ptr %tile, align 64
  ; by the smallest step of the row; what only scales of 0 have left is 0
  %end = getelementptr i8, ptr %units, i64 16384
  %at.8 = getelementptr i8, ptr %end, i64 4
  %step = load float, ptr %at.8, align 4
  %lane.8 = insertelement <16 x float> poison, float %step, i64 0
  %splat.8 = shufflevector <16 x float> %lane.8, <16 x float> poison, <16 x i32> zeroinitializer
  %value = load <16 x float>, ptr %tile, align 64
  %size = call <16 x float> @llvm.fabs.v16f32(<16 x float> %value)
  %some = fcmp oge <16 x float> %size, splat (float 0x3E60000000000000)
  %kept = select <16 x i1> %some, <16 x float> %value, <16 x float> zeroinitializer
  %scaled = fmul <16 x float> %kept, %splat.8
  store <16 x float> %scaled, ptr %tile, align 64
  %count = load i32, ptr %end, align 4
  %none = icmp eq i32 %count, 0
  br i1 %none, label %next, label %some.1
some.1:
  call void @q4_0_k4096_rough(ptr %x, ptr %end, ptr %w0, ptr %tile)
  br label %next
next:
  ret void
}

; 16 of 64 columns for rows %first … %end: 1 product(s) and the epilogue.
define internal void @q4jit_product.section0(ptr %args, i64 %task, i64 %first, i64 %end) #0 {
entry:
  %w.at = getelementptr i64, ptr %args, i64 3
  %w = load ptr, ptr %w.at, align 8
  %prologue.at = getelementptr i64, ptr %args, i64 5
  %prologue = load ptr, ptr %prologue.at, align 8
  %digits.at = getelementptr i64, ptr %args, i64 7
  %digits = load ptr, ptr %digits.at, align 8
  %exponent.at = getelementptr i64, ptr %args, i64 6
  %exponent = load ptr, ptr %exponent.at, align 8
  %output0.at = getelementptr i64, ptr %args, i64 4
  %output0 = load ptr, ptr %output0.at, align 8
  %tile = alloca [1 x <16 x float>], align 64
  %w_off = mul i64 %task, 36864
  %w_at = getelementptr i8, ptr %w, i64 %w_off
  br label %m0.head
m0.head:
  %m0 = phi i64 [ %first, %entry ], [ %m0.next, %m0.body ]
  %m0.more = icmp slt i64 %m0, %end
  br i1 %m0.more, label %m0.body, label %m0.done
m0.body:
  %x_off = mul i64 %m0, 4096
  %x_at = getelementptr float, ptr %prologue, i64 %x_off
  %digits_off = mul i64 %m0, 16960
  %digits_at = getelementptr i8, ptr %digits, i64 %digits_off
  call void @q4_0_k4096_rows1_digits3(ptr %x_at, ptr %digits_at, ptr %w_at, ptr %tile)
  %sum = load <16 x float>, ptr %tile, align 64
  %column = mul i64 %task, 16
  %at = getelementptr float, ptr %exponent, i64 %m0
  %scale = load float, ptr %at, align 4
  %lane = insertelement <16 x float> poison, float %scale, i64 0
  %splat = shufflevector <16 x float> %lane, <16 x float> poison, <16 x i32> zeroinitializer
  %product = fmul <16 x float> %sum, %splat
  %row_at = mul i64 %m0, 64
  %row_ptr = getelementptr float, ptr %output0, i64 %row_at
  %out_at = getelementptr float, ptr %row_ptr, i64 %column
  store <16 x float> %product, ptr %out_at, align 4
  %m0.next = add i64 %m0, 1
  br label %m0.head
m0.done:
  ret void
}

; Tasks are numbered through the sections.
define internal void @q4jit_product.columns(ptr %args, i64 %from, i64 %to) #0 {
entry:
  %m.at = getelementptr i64, ptr %args, i64 1
  %m = load i64, ptr %m.at, align 8
  br label %number.head
number.head:
  %number = phi i64 [ %from, %entry ], [ %number.next, %next ]
  %number.more = icmp slt i64 %number, %to
  br i1 %number.more, label %number.body, label %number.done
number.body:
  %inside = icmp slt i64 %number, 4
  br i1 %inside, label %here, label %other
here:
  call void @q4jit_product.section0(ptr %args, i64 %number, i64 0, i64 %m)
  br label %next
other:
  br label %next
next:
  %number.next = add i64 %number, 1
  br label %number.head
number.done:
  ret void
}

; task(args, from, to) over 0 … n, by the pool's threads where there is more than a chunk.
; A pool begins with the address of its own run(pool, task, args, n, chunk).
define internal void @parallel_for(ptr %pool, ptr %task, ptr %args, i64 %n, i64 %chunk) #0 {
entry:
  %alone = icmp eq ptr %pool, null
  %small = icmp sle i64 %n, %chunk
  %here = or i1 %alone, %small
  br i1 %here, label %serial, label %threads
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
  %pool.at = getelementptr i64, ptr %args, i64 0
  %pool = load ptr, ptr %pool.at, align 8
  %m.at = getelementptr i64, ptr %args, i64 1
  %m = load i64, ptr %m.at, align 8
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
