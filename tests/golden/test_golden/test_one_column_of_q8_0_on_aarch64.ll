; column for cpu:aarch64, 3 rows a tile, made by q4jit
; rows:
;   v0 = x
; 1 dot:
;   v1 = v0 @ w    Q8_0 [256, 1]
;   output0 = v1
; args: 0 pool, 1 m, 2 x, 3 w, 4 output0, 5 prologue, 6 exponent

target triple = "aarch64-unknown-linux-gnu"

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
define internal void @q4jit_column.row(ptr %args, i64 %row) #0 {
entry:
  %prologue.at = getelementptr i64, ptr %args, i64 5
  %prologue = load ptr, ptr %prologue.at, align 8
  %x.at = getelementptr i64, ptr %args, i64 2
  %x = load ptr, ptr %x.at, align 8
  %exponent.at = getelementptr i64, ptr %args, i64 6
  %exponent = load ptr, ptr %exponent.at, align 8
  %x_at = mul i64 %row, 256
  %x_row = getelementptr float, ptr %prologue, i64 %x_at
  ; x, and its largest finite magnitude
  br label %c.head
c.head:
  %c = phi i64 [ 0, %entry ], [ %c.next, %c.body ]
  %largest.c = phi <16 x float> [ zeroinitializer, %entry ], [ %largest, %c.body ]
  %c.more = icmp slt i64 %c, 256
  br i1 %c.more, label %c.body, label %c.done
c.body:
  %row_at = mul i64 %row, 256
  %row_ptr = getelementptr float, ptr %x, i64 %row_at
  %at = getelementptr float, ptr %row_ptr, i64 %c
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
  call void @normalise(ptr %x_row, i64 256, <16 x float> %largest.c, ptr %at.2)
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
define internal float @load_half_f32_align1(ptr %p) #1 {
entry:
  %half = load half, ptr %p, align 1
  %v = fpext half %half to float
  ret float %v
}

; Q8_0: bits to q − zero.
define internal <16 x float> @quant_q8_0(<16 x i32> %bits0) #1 {
entry:
  %top = shl <16 x i32> %bits0, splat (i32 24)
  %q = ashr <16 x i32> %top, splat (i32 24)
  %value = sitofp <16 x i32> %q to <16 x float>
  ret <16 x float> %value
}

; x · one column of Q8_0 with K = 256, 16 elements at a time.
define internal float @q8_0_k256_dot(ptr noalias %x, ptr noalias %row) #0 {
entry:
  br label %block.head
block.head:
  %block = phi i64 [ 0, %entry ], [ %block.next, %chunk.done ]
  %acc.block = phi <16 x float> [ zeroinitializer, %entry ], [ %acc, %chunk.done ]
  %block.more = icmp slt i64 %block, 8
  br i1 %block.more, label %block.body, label %block.done
block.body:
  %offset = mul i64 %block, 34
  %block_at = getelementptr i8, ptr %row, i64 %offset
  %d = call float @load_half_f32_align1(ptr %block_at)
  %lane = insertelement <16 x float> poison, float %d, i64 0
  %splat = shufflevector <16 x float> %lane, <16 x float> poison, <16 x i32> zeroinitializer
  br label %chunk.head
chunk.head:
  %chunk = phi i64 [ 0, %block.body ], [ %chunk.next, %chunk.body ]
  %part.chunk = phi <16 x float> [ zeroinitializer, %block.body ], [ %part, %chunk.body ]
  %chunk.more = icmp slt i64 %chunk, 2
  br i1 %chunk.more, label %chunk.body, label %chunk.done
chunk.body:
  %column = urem i64 %chunk, 2
  %byte = mul i64 %column, 16
  %bytes_at = add i64 %byte, 2
  %plane = getelementptr i8, ptr %block_at, i64 %bytes_at
  %bytes = load <16 x i8>, ptr %plane, align 1
  %bits = zext <16 x i8> %bytes to <16 x i32>
  %q = call <16 x float> @quant_q8_0(<16 x i32> %bits)
  %k = mul i64 %block, 32
  %k.1 = mul i64 %chunk, 16
  %k.2 = add i64 %k, %k.1
  %xk = getelementptr float, ptr %x, i64 %k.2
  %v = load <16 x float>, ptr %xk, align 4
  %part = call <16 x float> @llvm.fma.v16f32(<16 x float> %v, <16 x float> %q, <16 x float> %part.chunk)
  %chunk.next = add i64 %chunk, 1
  br label %chunk.head, !llvm.loop !0
chunk.done:
  %acc = call <16 x float> @llvm.fma.v16f32(<16 x float> %splat, <16 x float> %part.chunk, <16 x float> %acc.block)
  %block.next = add i64 %block, 1
  br label %block.head
block.done:
  %sum = call reassoc float @llvm.vector.reduce.fadd.v16f32(float -0.0, <16 x float> %acc.block)
  ret float %sum
}

; 16 of 1 columns for rows %first … %end: 1 product(s) and the epilogue.
define internal void @q4jit_column.section0(ptr %args, i64 %task, i64 %first, i64 %end) #0 {
entry:
  %prologue.at = getelementptr i64, ptr %args, i64 5
  %prologue = load ptr, ptr %prologue.at, align 8
  %w.at = getelementptr i64, ptr %args, i64 3
  %w = load ptr, ptr %w.at, align 8
  %exponent.at = getelementptr i64, ptr %args, i64 6
  %exponent = load ptr, ptr %exponent.at, align 8
  %output0.at = getelementptr i64, ptr %args, i64 4
  %output0 = load ptr, ptr %output0.at, align 8
  %column = mul i64 %task, 16
  %stop = add i64 %column, 16
  %over = icmp sgt i64 %stop, 1
  %stop.1 = select i1 %over, i64 1, i64 %stop
  br label %n.head
n.head:
  %n = phi i64 [ %column, %entry ], [ %n.next, %row.done ]
  %n.more = icmp slt i64 %n, %stop.1
  br i1 %n.more, label %n.body, label %n.done
n.body:
  br label %row.head
row.head:
  %row = phi i64 [ %first, %n.body ], [ %row.next, %row.body ]
  %row.more = icmp slt i64 %row, %end
  br i1 %row.more, label %row.body, label %row.done
row.body:
  %x_off = mul i64 %row, 256
  %x_at = getelementptr float, ptr %prologue, i64 %x_off
  %w_off = mul i64 %n, 272
  %w_at = getelementptr i8, ptr %w, i64 %w_off
  %dot = call float @q8_0_k256_dot(ptr %x_at, ptr %w_at)
  %at = getelementptr float, ptr %exponent, i64 %row
  %scale = load float, ptr %at, align 4
  %product = fmul float %dot, %scale
  %row_ptr = getelementptr float, ptr %output0, i64 %row
  %out_at = getelementptr float, ptr %row_ptr, i64 %n
  store float %product, ptr %out_at, align 4
  %row.next = add i64 %row, 1
  br label %row.head
row.done:
  %n.next = add i64 %n, 1
  br label %n.head
n.done:
  ret void
}

; Tasks are numbered through the sections.
define internal void @q4jit_column.columns(ptr %args, i64 %from, i64 %to) #0 {
entry:
  %m.at = getelementptr i64, ptr %args, i64 1
  %m = load i64, ptr %m.at, align 8
  br label %number.head
number.head:
  %number = phi i64 [ %from, %entry ], [ %number.next, %next ]
  %number.more = icmp slt i64 %number, %to
  br i1 %number.more, label %number.body, label %number.done
number.body:
  %inside = icmp slt i64 %number, 1
  br i1 %inside, label %here, label %other
here:
  call void @q4jit_column.section0(ptr %args, i64 %number, i64 0, i64 %m)
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
define void @q4jit_column(ptr %args) #0 {
entry:
  %pool.at = getelementptr i64, ptr %args, i64 0
  %pool = load ptr, ptr %pool.at, align 8
  %m.at = getelementptr i64, ptr %args, i64 1
  %m = load i64, ptr %m.at, align 8
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
