; product for cpu:x86-64-v4, M = 1, made by q4jit
; rows:
;   v0 = x
; 64 columns:
;   v1 = v0 @ w    Q4_0 [4096, 64]
;   output0 = v1
; args: 0 pool, 1 m, 2 x, 3 w, 4 output0, 5 prologue, 6 exponent

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
define internal void @q4jit_product.row(ptr %args, i64 %row) #0 {
entry:
  %prologue.at = getelementptr i64, ptr %args, i64 5
  %prologue = load ptr, ptr %prologue.at, align 8
  %x.at = getelementptr i64, ptr %args, i64 2
  %x = load ptr, ptr %x.at, align 8
  %exponent.at = getelementptr i64, ptr %args, i64 6
  %exponent = load ptr, ptr %exponent.at, align 8
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
define internal <16 x float> @multiply_add(<16 x float> %sum, ptr %x, <16 x float> %weights) #1 {
entry:
  %x0 = load float, ptr %x, align 4
  %lane = insertelement <16 x float> poison, float %x0, i64 0
  %splat = shufflevector <16 x float> %lane, <16 x float> poison, <16 x i32> zeroinitializer
  %total = call <16 x float> @llvm.fma.v16f32(<16 x float> %splat, <16 x float> %weights, <16 x float> %sum)
  ret <16 x float> %total
}

; f16 as f32, exactly.
define internal <16 x float> @load_half_v16f32(ptr %p) #1 {
entry:
  %half = load <16 x half>, ptr %p, align 2
  %v = fpext <16 x half> %half to <16 x float>
  ret <16 x float> %v
}

; Q4_0: bits to q − zero.
define internal <16 x float> @quant_q4_0(<16 x i32> %bits0) #1 {
entry:
  %q = call <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float> <float -8.0, float -7.0, float -6.0, float -5.0, float -4.0, float -3.0, float -2.0, float -1.0, float 0.0, float 1.0, float 2.0, float 3.0, float 4.0, float 5.0, float 6.0, float 7.0>, <16 x i32> %bits0)
  ret <16 x float> %q
}

; 16 columns of Q4_0, one a lane, times 1 row of x; K = 4096.
; 64 tiles of 576 bytes, each 2 blocks of 32 elements; rows of x lie 4096 floats apart.
define internal void @q4_0_k4096_rows1(ptr noalias %x, ptr noalias %w, ptr noalias %tile) #0 {
entry:
  br label %tile.1.head
tile.1.head:
  %tile.1 = phi i64 [ 0, %entry ], [ %tile.1.next, %block.done ]
  %acc0.tile.1 = phi <16 x float> [ zeroinitializer, %entry ], [ %acc0.block, %block.done ]
  %tile.1.more = icmp slt i64 %tile.1, 64
  br i1 %tile.1.more, label %tile.1.body, label %tile.1.done
tile.1.body:
  %offset = mul i64 %tile.1, 576
  %tile_at = getelementptr i8, ptr %w, i64 %offset
  br label %block.head
block.head:
  %block = phi i64 [ 0, %tile.1.body ], [ %block.next, %chunk.done ]
  %acc0.block = phi <16 x float> [ %acc0.tile.1, %tile.1.body ], [ %acc0, %chunk.done ]
  %block.more = icmp slt i64 %block, 2
  br i1 %block.more, label %block.body, label %block.done
block.body:
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
  %k = mul i64 %tile.1, 64
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
  %pile32 = trunc i64 %chunk to i32
  %shift = mul i32 %pile32, 4
  %quants0_at = mul i64 %block, 256
  %quants0_at.1 = add i64 %quants0_at, 64
  %quants0 = getelementptr i8, ptr %tile_at, i64 %quants0_at.1
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
  ; x[k … k+3] times four weights of every column
  %xk = getelementptr float, ptr %x, i64 %k.6
  %part0.0 = call <16 x float> @multiply_add(<16 x float> %part0.0.word, ptr %xk, <16 x float> %q0)
  %k.7 = add i64 %k.6, 1
  %xk.1 = getelementptr float, ptr %x, i64 %k.7
  %part0.1 = call <16 x float> @multiply_add(<16 x float> %part0.1.word, ptr %xk.1, <16 x float> %q1)
  %k.8 = add i64 %k.6, 2
  %xk.2 = getelementptr float, ptr %x, i64 %k.8
  %part0.2 = call <16 x float> @multiply_add(<16 x float> %part0.2.word, ptr %xk.2, <16 x float> %q2)
  %k.9 = add i64 %k.6, 3
  %xk.3 = getelementptr float, ptr %x, i64 %k.9
  %part0.3 = call <16 x float> @multiply_add(<16 x float> %part0.3.word, ptr %xk.3, <16 x float> %q3)
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
  %acc0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %d16, <16 x float> %part.2, <16 x float> %acc0.block)
  %block.next = add i64 %block, 1
  br label %block.head, !llvm.loop !0
block.done:
  %tile.1.next = add i64 %tile.1, 1
  br label %tile.1.head
tile.1.done:
  store <16 x float> %acc0.tile.1, ptr %tile, align 64
  ret void
}

; 16 of 64 columns for rows %first … %end: 1 product(s) and the epilogue.
define internal void @q4jit_product.section0(ptr %args, i64 %task, i64 %first, i64 %end) #0 {
entry:
  %w.at = getelementptr i64, ptr %args, i64 3
  %w = load ptr, ptr %w.at, align 8
  %prologue.at = getelementptr i64, ptr %args, i64 5
  %prologue = load ptr, ptr %prologue.at, align 8
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
  call void @q4_0_k4096_rows1(ptr %x_at, ptr %w_at, ptr %tile)
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
declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare i32 @llvm.smax.i32(i32, i32)
declare i32 @llvm.smin.i32(i32, i32)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

attributes #0 = { nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }
attributes #1 = { alwaysinline nounwind }

!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}
