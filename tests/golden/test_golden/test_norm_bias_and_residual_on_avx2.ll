; layer for cpu:x86-64-v3, M = 1, made by q4jit
; rows:
;   v12 = x / sqrt(sum(x * x) / 64 + 1e-05) * gain
; 40 columns:
;   v13 = v12 @ w    F32 [64, 40]
;   output0 = v13 + bias + residual
; args: 0 pool, 1 m, 2 x, 3 gain, 4 bias, 5 residual, 6 w, 7 output0, 8 prologue, 9 exponent

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

; One row before the products: x, and what the columns phase needs of it.
define internal void @q4jit_layer.row(ptr %args, i64 %row) #0 {
entry:
  %x.at = getelementptr i64, ptr %args, i64 2
  %x = load ptr, ptr %x.at, align 8
  %prologue.at = getelementptr i64, ptr %args, i64 8
  %prologue = load ptr, ptr %prologue.at, align 8
  %gain.at = getelementptr i64, ptr %args, i64 3
  %gain = load ptr, ptr %gain.at, align 8
  %exponent.at = getelementptr i64, ptr %args, i64 9
  %exponent = load ptr, ptr %exponent.at, align 8
  ; sum over 64
  br label %c.head
c.head:
  %c = phi i64 [ 0, %entry ], [ %c.next, %c.body ]
  %sum.c = phi <16 x float> [ zeroinitializer, %entry ], [ %sum, %c.body ]
  %c.more = icmp slt i64 %c, 64
  br i1 %c.more, label %c.body, label %c.done
c.body:
  %at = getelementptr float, ptr %x, i64 %c
  %v = load <16 x float>, ptr %at, align 4
  %mul = fmul <16 x float> %v, %v
  %sum = fadd <16 x float> %sum.c, %mul
  %c.next = add i64 %c, 16
  br label %c.head
c.done:
  %sum.1 = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %sum.c)
  %x_at = mul i64 %row, 64
  %x_row = getelementptr float, ptr %prologue, i64 %x_at
  %div = fdiv float %sum.1, 64.0
  %add = fadd float %div, 0x3EE4F8B580000000
  %sqrt = call float @llvm.sqrt.f32(float %add)
  ; x, and its largest finite magnitude
  br label %c.1.head
c.1.head:
  %c.1 = phi i64 [ 0, %c.done ], [ %c.1.next, %c.1.body ]
  %largest.c.1 = phi <16 x float> [ zeroinitializer, %c.done ], [ %largest, %c.1.body ]
  %c.1.more = icmp slt i64 %c.1, 64
  br i1 %c.1.more, label %c.1.body, label %c.1.done
c.1.body:
  %at.1 = getelementptr float, ptr %x, i64 %c.1
  %v.1 = load <16 x float>, ptr %at.1, align 4
  %lane = insertelement <16 x float> poison, float %sqrt, i64 0
  %splat = shufflevector <16 x float> %lane, <16 x float> poison, <16 x i32> zeroinitializer
  %div.1 = fdiv <16 x float> %v.1, %splat
  %at.2 = getelementptr float, ptr %gain, i64 %c.1
  %v.2 = load <16 x float>, ptr %at.2, align 4
  %mul.1 = fmul <16 x float> %div.1, %v.2
  %at.3 = getelementptr float, ptr %x_row, i64 %c.1
  store <16 x float> %mul.1, ptr %at.3, align 4
  %size = call <16 x float> @llvm.fabs.v16f32(<16 x float> %mul.1)
  %finite = fcmp olt <16 x float> %size, splat (float 0x7FF0000000000000)
  %larger = fcmp ogt <16 x float> %size, %largest.c.1
  %both = and <16 x i1> %finite, %larger
  %largest = select <16 x i1> %both, <16 x float> %size, <16 x float> %largest.c.1
  %c.1.next = add i64 %c.1, 16
  br label %c.1.head
c.1.done:
  %at.4 = getelementptr float, ptr %exponent, i64 %row
  call void @normalise(ptr %x_row, i64 64, <16 x float> %largest.c.1, ptr %at.4)
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
define internal <16 x float> @multiply_add(<16 x float> %sum, ptr %x, <16 x float> %weights) #1 {
entry:
  %x0 = load float, ptr %x, align 4
  %lane = insertelement <16 x float> poison, float %x0, i64 0
  %splat = shufflevector <16 x float> %lane, <16 x float> poison, <16 x i32> zeroinitializer
  %total = call <16 x float> @llvm.fma.v16f32(<16 x float> %splat, <16 x float> %weights, <16 x float> %sum)
  ret <16 x float> %total
}

; 16 columns of F32, one a lane, times 1 row of x; K = 64.
; 1 tiles of 4096 bytes, each 2 blocks of 32 elements; rows of x lie 64 floats apart.
define internal void @f32_k64_rows1(ptr noalias %x, ptr noalias %w, ptr noalias %tile) #0 {
entry:
  br label %block.head
block.head:
  %block = phi i64 [ 0, %entry ], [ %block.next, %chunk.done ]
  %acc0.block = phi <16 x float> [ zeroinitializer, %entry ], [ %acc0, %chunk.done ]
  %block.more = icmp slt i64 %block, 2
  br i1 %block.more, label %block.body, label %block.done
block.body:
  ; the same place 8192 bytes ahead
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
  call void @llvm.prefetch.p0(ptr %ahead_at, i32 0, i32 2, i32 1) ; read, second level
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
  %number = mul i64 %chunk, 16
  %number.1 = mul i64 %word, 4
  %number.2 = add i64 %number, %number.1
  %value_at = mul i64 %number.2, 64
  %values_at = mul i64 %block, 2048
  %values = getelementptr i8, ptr %w, i64 %values_at
  %at = getelementptr i8, ptr %values, i64 %value_at
  %weight = load <16 x float>, ptr %at, align 4
  %number.3 = mul i64 %chunk, 16
  %number.4 = mul i64 %word, 4
  %number.5 = add i64 %number.3, %number.4
  %number.6 = add i64 %number.5, 1
  %value_at.1 = mul i64 %number.6, 64
  %values_at.1 = mul i64 %block, 2048
  %values.1 = getelementptr i8, ptr %w, i64 %values_at.1
  %at.1 = getelementptr i8, ptr %values.1, i64 %value_at.1
  %weight.1 = load <16 x float>, ptr %at.1, align 4
  %number.7 = mul i64 %chunk, 16
  %number.8 = mul i64 %word, 4
  %number.9 = add i64 %number.7, %number.8
  %number.10 = add i64 %number.9, 2
  %value_at.2 = mul i64 %number.10, 64
  %values_at.2 = mul i64 %block, 2048
  %values.2 = getelementptr i8, ptr %w, i64 %values_at.2
  %at.2 = getelementptr i8, ptr %values.2, i64 %value_at.2
  %weight.2 = load <16 x float>, ptr %at.2, align 4
  %number.11 = mul i64 %chunk, 16
  %number.12 = mul i64 %word, 4
  %number.13 = add i64 %number.11, %number.12
  %number.14 = add i64 %number.13, 3
  %value_at.3 = mul i64 %number.14, 64
  %values_at.3 = mul i64 %block, 2048
  %values.3 = getelementptr i8, ptr %w, i64 %values_at.3
  %at.3 = getelementptr i8, ptr %values.3, i64 %value_at.3
  %weight.3 = load <16 x float>, ptr %at.3, align 4
  ; x[k … k+3] times four weights of every column
  %xk = getelementptr float, ptr %x, i64 %k.4
  %part0.0 = call <16 x float> @multiply_add(<16 x float> %part0.0.word, ptr %xk, <16 x float> %weight)
  %k.5 = add i64 %k.4, 1
  %xk.1 = getelementptr float, ptr %x, i64 %k.5
  %part0.1 = call <16 x float> @multiply_add(<16 x float> %part0.1.word, ptr %xk.1, <16 x float> %weight.1)
  %k.6 = add i64 %k.4, 2
  %xk.2 = getelementptr float, ptr %x, i64 %k.6
  %part0.2 = call <16 x float> @multiply_add(<16 x float> %part0.2.word, ptr %xk.2, <16 x float> %weight.2)
  %k.7 = add i64 %k.4, 3
  %xk.3 = getelementptr float, ptr %x, i64 %k.7
  %part0.3 = call <16 x float> @multiply_add(<16 x float> %part0.3.word, ptr %xk.3, <16 x float> %weight.3)
  %word.next = add i64 %word, 1
  br label %word.head, !llvm.loop !0
word.done:
  %chunk.next = add i64 %chunk, 1
  br label %chunk.head, !llvm.loop !0
chunk.done:
  ; sum by blocks: short sums keep the rounding error small
  %part = fadd <16 x float> %part0.0.chunk, %part0.1.chunk
  %part.1 = fadd <16 x float> %part, %part0.2.chunk
  %part.2 = fadd <16 x float> %part.1, %part0.3.chunk
  %acc0 = fadd <16 x float> %acc0.block, %part.2
  %block.next = add i64 %block, 1
  br label %block.head, !llvm.loop !0
block.done:
  store <16 x float> %acc0.block, ptr %tile, align 64
  ret void
}

; 16 of 40 columns for rows %first … %end: 1 product(s) and the epilogue.
define internal void @q4jit_layer.section0(ptr %args, i64 %task, i64 %first, i64 %end) #0 {
entry:
  %w.at = getelementptr i64, ptr %args, i64 6
  %w = load ptr, ptr %w.at, align 8
  %prologue.at = getelementptr i64, ptr %args, i64 8
  %prologue = load ptr, ptr %prologue.at, align 8
  %exponent.at = getelementptr i64, ptr %args, i64 9
  %exponent = load ptr, ptr %exponent.at, align 8
  %output0.at = getelementptr i64, ptr %args, i64 7
  %output0 = load ptr, ptr %output0.at, align 8
  %bias.at = getelementptr i64, ptr %args, i64 4
  %bias = load ptr, ptr %bias.at, align 8
  %residual.at = getelementptr i64, ptr %args, i64 5
  %residual = load ptr, ptr %residual.at, align 8
  %tile = alloca [1 x <16 x float>], align 64
  %w_off = mul i64 %task, 4096
  %w_at = getelementptr i8, ptr %w, i64 %w_off
  br label %m0.head
m0.head:
  %m0 = phi i64 [ %first, %entry ], [ %m0.next, %m0.body ]
  %m0.more = icmp slt i64 %m0, %end
  br i1 %m0.more, label %m0.body, label %m0.done
m0.body:
  %x_off = mul i64 %m0, 64
  %x_at = getelementptr float, ptr %prologue, i64 %x_off
  call void @f32_k64_rows1(ptr %x_at, ptr %w_at, ptr %tile)
  %sum = load <16 x float>, ptr %tile, align 64
  %column = mul i64 %task, 16
  %left = sub i64 40, %column
  %more = icmp sgt i64 %left, 16
  %few = select i1 %more, i64 16, i64 %left
  %left32 = trunc i64 %few to i32
  %lane = insertelement <16 x i32> poison, i32 %left32, i64 0
  %splat = shufflevector <16 x i32> %lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %mask = icmp slt <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>, %splat
  %at = getelementptr float, ptr %exponent, i64 %m0
  %scale = load float, ptr %at, align 4
  %lane.1 = insertelement <16 x float> poison, float %scale, i64 0
  %splat.1 = shufflevector <16 x float> %lane.1, <16 x float> poison, <16 x i32> zeroinitializer
  %product = fmul <16 x float> %sum, %splat.1
  %row_at = mul i64 %m0, 40
  %row_ptr = getelementptr float, ptr %output0, i64 %row_at
  %at.1 = getelementptr float, ptr %bias, i64 %column
  %v = call <16 x float> @llvm.masked.load.v16f32.p0(ptr %at.1, i32 4, <16 x i1> %mask, <16 x float> zeroinitializer)
  %add = fadd <16 x float> %product, %v
  %at.2 = getelementptr float, ptr %residual, i64 %column
  %v.1 = call <16 x float> @llvm.masked.load.v16f32.p0(ptr %at.2, i32 4, <16 x i1> %mask, <16 x float> zeroinitializer)
  %add.1 = fadd <16 x float> %add, %v.1
  %out_at = getelementptr float, ptr %row_ptr, i64 %column
  call void @llvm.masked.store.v16f32.p0(<16 x float> %add.1, ptr %out_at, i32 4, <16 x i1> %mask)
  %m0.next = add i64 %m0, 1
  br label %m0.head
m0.done:
  ret void
}

; Tasks are numbered through the sections.
define internal void @q4jit_layer.columns(ptr %args, i64 %from, i64 %to) #0 {
entry:
  %m.at = getelementptr i64, ptr %args, i64 1
  %m = load i64, ptr %m.at, align 8
  br label %number.head
number.head:
  %number = phi i64 [ %from, %entry ], [ %number.next, %next ]
  %number.more = icmp slt i64 %number, %to
  br i1 %number.more, label %number.body, label %number.done
number.body:
  %inside = icmp slt i64 %number, 3
  br i1 %inside, label %here, label %other
here:
  call void @q4jit_layer.section0(ptr %args, i64 %number, i64 0, i64 %m)
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
define void @q4jit_layer(ptr %args) #0 {
entry:
  %pool.at = getelementptr i64, ptr %args, i64 0
  %pool = load ptr, ptr %pool.at, align 8
  %m.at = getelementptr i64, ptr %args, i64 1
  %m = load i64, ptr %m.at, align 8
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
