; product for cpu:x86-64-v4, M = 1 of 64 columns, made by q4jit
; rows:
;   v0 = y
; 64 columns, transposed:
;   v1 = v0 @ w.T    Q4_0 [64, 2000]
;   output0 = v1

target triple = "x86_64-unknown-linux-gnu"

; The kernel's arguments, 8 bytes each.
%Slots = type {
  ptr,  ; 0 pool
  i64,  ; 1 m
  ptr,  ; 2 y
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
  %y_slot = getelementptr %Slots, ptr %args, i64 0, i32 2
  %y = load ptr, ptr %y_slot, align 8
  %row_factors_slot = getelementptr %Slots, ptr %args, i64 0, i32 6
  %row_factors = load ptr, ptr %row_factors_slot, align 8
  %prologue_offset = mul i64 %row, 2000
  %prologue_row_at = getelementptr float, ptr %prologue, i64 %prologue_offset
  ; x of the products, and its largest finite magnitude
  br label %column.head
column.head:
  %column = phi i64 [ 0, %entry ], [ %column.next, %column.body ]
  %largest.column = phi <16 x float> [ zeroinitializer, %entry ], [ %largest, %column.body ]
  %column.more = icmp slt i64 %column, 2000
  br i1 %column.more, label %column.body, label %column.done
column.body:
  %y_at = getelementptr float, ptr %y, i64 %column
  %y_columns = load <16 x float>, ptr %y_at, align 4
  %prologue_at = getelementptr float, ptr %prologue_row_at, i64 %column
  store <16 x float> %y_columns, ptr %prologue_at, align 4
  %magnitude = call <16 x float> @llvm.fabs.v16f32(<16 x float> %y_columns)
  %finite = fcmp olt <16 x float> %magnitude, splat (float 0x7FF0000000000000)  ; Inf
  %larger = fcmp ogt <16 x float> %magnitude, %largest.column
  %both = and <16 x i1> %finite, %larger
  %largest = select <16 x i1> %both, <16 x float> %magnitude, <16 x float> %largest.column
  %column.next = add i64 %column, 16
  br label %column.head
column.done:
  %row_factor_at = getelementptr float, ptr %row_factors, i64 %row
  call void @normalise(ptr %prologue_row_at, i64 2000, <16 x float> %largest.column, ptr %row_factor_at)
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

; Q4_0: the quant in the lowest bits of each lane, as a float.
define internal <16 x float> @quant_q4_0(<16 x i32> %bits0) #1 {
entry:
  ; vpermps reads only the low four bits of a lane: it masks, subtracts and converts
  %quant = call <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float> <float -8.0, float -7.0, float -6.0, float -5.0, float -4.0, float -3.0, float -2.0, float -1.0, float 0.0, float 1.0, float 2.0, float 3.0, float 4.0, float 5.0, float 6.0, float 7.0>, <16 x i32> %bits0)
  ret <16 x float> %quant
}

; The sums of the lanes of 16 vectors: each step halves the vectors.
define internal <16 x float> @sum_of_lanes(ptr %vectors) noinline #0 {
entry:
  %vector = load <16 x float>, ptr %vectors, align 64
  %vector_at = getelementptr <16 x float>, ptr %vectors, i64 1
  %vector.1 = load <16 x float>, ptr %vector_at, align 64
  %vector_at.1 = getelementptr <16 x float>, ptr %vectors, i64 2
  %vector.2 = load <16 x float>, ptr %vector_at.1, align 64
  %vector_at.2 = getelementptr <16 x float>, ptr %vectors, i64 3
  %vector.3 = load <16 x float>, ptr %vector_at.2, align 64
  %vector_at.3 = getelementptr <16 x float>, ptr %vectors, i64 4
  %vector.4 = load <16 x float>, ptr %vector_at.3, align 64
  %vector_at.4 = getelementptr <16 x float>, ptr %vectors, i64 5
  %vector.5 = load <16 x float>, ptr %vector_at.4, align 64
  %vector_at.5 = getelementptr <16 x float>, ptr %vectors, i64 6
  %vector.6 = load <16 x float>, ptr %vector_at.5, align 64
  %vector_at.6 = getelementptr <16 x float>, ptr %vectors, i64 7
  %vector.7 = load <16 x float>, ptr %vector_at.6, align 64
  %vector_at.7 = getelementptr <16 x float>, ptr %vectors, i64 8
  %vector.8 = load <16 x float>, ptr %vector_at.7, align 64
  %vector_at.8 = getelementptr <16 x float>, ptr %vectors, i64 9
  %vector.9 = load <16 x float>, ptr %vector_at.8, align 64
  %vector_at.9 = getelementptr <16 x float>, ptr %vectors, i64 10
  %vector.10 = load <16 x float>, ptr %vector_at.9, align 64
  %vector_at.10 = getelementptr <16 x float>, ptr %vectors, i64 11
  %vector.11 = load <16 x float>, ptr %vector_at.10, align 64
  %vector_at.11 = getelementptr <16 x float>, ptr %vectors, i64 12
  %vector.12 = load <16 x float>, ptr %vector_at.11, align 64
  %vector_at.12 = getelementptr <16 x float>, ptr %vectors, i64 13
  %vector.13 = load <16 x float>, ptr %vector_at.12, align 64
  %vector_at.13 = getelementptr <16 x float>, ptr %vectors, i64 14
  %vector.14 = load <16 x float>, ptr %vector_at.13, align 64
  %vector_at.14 = getelementptr <16 x float>, ptr %vectors, i64 15
  %vector.15 = load <16 x float>, ptr %vector_at.14, align 64
  %side = shufflevector <16 x float> %vector, <16 x float> %vector.8, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %side.1 = shufflevector <16 x float> %vector, <16 x float> %vector.8, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %folded = fadd <16 x float> %side, %side.1
  %side.2 = shufflevector <16 x float> %vector.1, <16 x float> %vector.9, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %side.3 = shufflevector <16 x float> %vector.1, <16 x float> %vector.9, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %folded.1 = fadd <16 x float> %side.2, %side.3
  %side.4 = shufflevector <16 x float> %vector.2, <16 x float> %vector.10, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %side.5 = shufflevector <16 x float> %vector.2, <16 x float> %vector.10, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %folded.2 = fadd <16 x float> %side.4, %side.5
  %side.6 = shufflevector <16 x float> %vector.3, <16 x float> %vector.11, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %side.7 = shufflevector <16 x float> %vector.3, <16 x float> %vector.11, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %folded.3 = fadd <16 x float> %side.6, %side.7
  %side.8 = shufflevector <16 x float> %vector.4, <16 x float> %vector.12, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %side.9 = shufflevector <16 x float> %vector.4, <16 x float> %vector.12, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %folded.4 = fadd <16 x float> %side.8, %side.9
  %side.10 = shufflevector <16 x float> %vector.5, <16 x float> %vector.13, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %side.11 = shufflevector <16 x float> %vector.5, <16 x float> %vector.13, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %folded.5 = fadd <16 x float> %side.10, %side.11
  %side.12 = shufflevector <16 x float> %vector.6, <16 x float> %vector.14, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %side.13 = shufflevector <16 x float> %vector.6, <16 x float> %vector.14, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %folded.6 = fadd <16 x float> %side.12, %side.13
  %side.14 = shufflevector <16 x float> %vector.7, <16 x float> %vector.15, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %side.15 = shufflevector <16 x float> %vector.7, <16 x float> %vector.15, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %folded.7 = fadd <16 x float> %side.14, %side.15
  %side.16 = shufflevector <16 x float> %folded, <16 x float> %folded.4, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 20, i32 21, i32 22, i32 23, i32 8, i32 9, i32 10, i32 11, i32 28, i32 29, i32 30, i32 31>
  %side.17 = shufflevector <16 x float> %folded, <16 x float> %folded.4, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27>
  %folded.8 = fadd <16 x float> %side.16, %side.17
  %side.18 = shufflevector <16 x float> %folded.1, <16 x float> %folded.5, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 20, i32 21, i32 22, i32 23, i32 8, i32 9, i32 10, i32 11, i32 28, i32 29, i32 30, i32 31>
  %side.19 = shufflevector <16 x float> %folded.1, <16 x float> %folded.5, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27>
  %folded.9 = fadd <16 x float> %side.18, %side.19
  %side.20 = shufflevector <16 x float> %folded.2, <16 x float> %folded.6, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 20, i32 21, i32 22, i32 23, i32 8, i32 9, i32 10, i32 11, i32 28, i32 29, i32 30, i32 31>
  %side.21 = shufflevector <16 x float> %folded.2, <16 x float> %folded.6, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27>
  %folded.10 = fadd <16 x float> %side.20, %side.21
  %side.22 = shufflevector <16 x float> %folded.3, <16 x float> %folded.7, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 20, i32 21, i32 22, i32 23, i32 8, i32 9, i32 10, i32 11, i32 28, i32 29, i32 30, i32 31>
  %side.23 = shufflevector <16 x float> %folded.3, <16 x float> %folded.7, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27>
  %folded.11 = fadd <16 x float> %side.22, %side.23
  %side.24 = shufflevector <16 x float> %folded.8, <16 x float> %folded.10, <16 x i32> <i32 0, i32 1, i32 18, i32 19, i32 4, i32 5, i32 22, i32 23, i32 8, i32 9, i32 26, i32 27, i32 12, i32 13, i32 30, i32 31>
  %side.25 = shufflevector <16 x float> %folded.8, <16 x float> %folded.10, <16 x i32> <i32 2, i32 3, i32 16, i32 17, i32 6, i32 7, i32 20, i32 21, i32 10, i32 11, i32 24, i32 25, i32 14, i32 15, i32 28, i32 29>
  %folded.12 = fadd <16 x float> %side.24, %side.25
  %side.26 = shufflevector <16 x float> %folded.9, <16 x float> %folded.11, <16 x i32> <i32 0, i32 1, i32 18, i32 19, i32 4, i32 5, i32 22, i32 23, i32 8, i32 9, i32 26, i32 27, i32 12, i32 13, i32 30, i32 31>
  %side.27 = shufflevector <16 x float> %folded.9, <16 x float> %folded.11, <16 x i32> <i32 2, i32 3, i32 16, i32 17, i32 6, i32 7, i32 20, i32 21, i32 10, i32 11, i32 24, i32 25, i32 14, i32 15, i32 28, i32 29>
  %folded.13 = fadd <16 x float> %side.26, %side.27
  %side.28 = shufflevector <16 x float> %folded.12, <16 x float> %folded.13, <16 x i32> <i32 0, i32 17, i32 2, i32 19, i32 4, i32 21, i32 6, i32 23, i32 8, i32 25, i32 10, i32 27, i32 12, i32 29, i32 14, i32 31>
  %side.29 = shufflevector <16 x float> %folded.12, <16 x float> %folded.13, <16 x i32> <i32 1, i32 16, i32 3, i32 18, i32 5, i32 20, i32 7, i32 22, i32 9, i32 24, i32 11, i32 26, i32 13, i32 28, i32 15, i32 30>
  %folded.14 = fadd <16 x float> %side.28, %side.29
  ret <16 x float> %folded.14
}

; The sums over panels %first … %end of y times the 16 rows of a chunk of K.
define internal void @q4_0_t_k64_n2000_rows1_chunks4_stretch(ptr noalias %y, ptr noalias %w, ptr noalias %parts, i64 %first, i64 %end, i64 %chunk, i64 %rows) #0 {
entry:
  %lanes = alloca [16 x <16 x float>], align 64
  %block = udiv i64 %chunk, 2
  %chunk_in_block = urem i64 %chunk, 2
  %slab = udiv i64 %block, 2
  %block_in_slab = urem i64 %block, 2
  %slab_offset = mul i64 %slab, 576
  %slabs_at = getelementptr i8, ptr %w, i64 %slab_offset
  %is_last = icmp eq i64 %end, 125
  %next = add i64 %chunk, 4
  %chunk_ahead = select i1 %is_last, i64 %next, i64 %chunk
  %back = sub i64 0, %first
  %distance = select i1 %is_last, i64 %back, i64 64
  %block.1 = udiv i64 %chunk_ahead, 2
  %chunk_in_block.1 = urem i64 %chunk_ahead, 2
  %slab.1 = udiv i64 %block.1, 2
  %block_in_slab.1 = urem i64 %block.1, 2
  %slab_offset.1 = mul i64 %slab.1, 576
  %slabs_at.1 = getelementptr i8, ptr %w, i64 %slab_offset.1
  ; elements 0 … 15 of the chunk
  br label %panel.head
panel.head:
  %panel = phi i64 [ %first, %entry ], [ %panel.next, %panel.body ]
  %sum0.0.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.0, %panel.body ]
  %sum0.1.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.1, %panel.body ]
  %sum0.2.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.2, %panel.body ]
  %sum0.3.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.3, %panel.body ]
  %sum0.4.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.4, %panel.body ]
  %sum0.5.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.5, %panel.body ]
  %sum0.6.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.6, %panel.body ]
  %sum0.7.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.7, %panel.body ]
  %sum0.8.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.8, %panel.body ]
  %sum0.9.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.9, %panel.body ]
  %sum0.10.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.10, %panel.body ]
  %sum0.11.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.11, %panel.body ]
  %sum0.12.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.12, %panel.body ]
  %sum0.13.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.13, %panel.body ]
  %sum0.14.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.14, %panel.body ]
  %sum0.15.panel = phi <16 x float> [ zeroinitializer, %entry ], [ %sum0.15, %panel.body ]
  %panel.more = icmp slt i64 %panel, %end
  br i1 %panel.more, label %panel.body, label %panel.done
panel.body:
  %panel_ahead = add i64 %panel, %distance
  %panel_offset = mul i64 %panel_ahead, 576
  %slab_at = getelementptr i8, ptr %slabs_at.1, i64 %panel_offset
  ; prefetch a later panel
  %layer32 = trunc i64 %chunk_in_block.1 to i32
  %shift = mul i32 %layer32, 4
  %quants0_offset = mul i64 %block_in_slab.1, 256
  %quants0_offset.1 = add i64 %quants0_offset, 64
  %quants0_at = getelementptr i8, ptr %slab_at, i64 %quants0_offset.1
  %block_scale_offset = mul i64 %block_in_slab.1, 32
  %block_scale_at = getelementptr i8, ptr %slab_at, i64 %block_scale_offset
  %bit = zext i32 %shift to i64
  %own_offset = mul i64 %bit, 32
  %own_at = getelementptr i8, ptr %quants0_at, i64 %own_offset
  call void @llvm.prefetch.p0(ptr %block_scale_at, i32 0, i32 2, i32 1)  ; read, second level
  call void @llvm.prefetch.p0(ptr %own_at, i32 0, i32 2, i32 1)  ; read, second level
  %ahead_at = getelementptr i8, ptr %own_at, i64 64
  call void @llvm.prefetch.p0(ptr %ahead_at, i32 0, i32 2, i32 1)  ; read, second level
  %panel_offset.1 = mul i64 %panel, 576
  %slab_at.1 = getelementptr i8, ptr %slabs_at, i64 %panel_offset.1
  %block_scale_offset.1 = mul i64 %block_in_slab, 32
  %block_scale_at.1 = getelementptr i8, ptr %slab_at.1, i64 %block_scale_offset.1
  %block_scale = call <16 x float> @load_f16_v16f32(ptr %block_scale_at.1)
  %y_offset = mul i64 %panel, 16
  %y_at = getelementptr float, ptr %y, i64 %y_offset
  %y.1 = load <16 x float>, ptr %y_at, align 4
  %y_scaled = fmul <16 x float> %y.1, %block_scale
  %layer32.1 = trunc i64 %chunk_in_block to i32
  %shift.1 = mul i32 %layer32.1, 4
  %quants0_offset.2 = mul i64 %block_in_slab, 256
  %quants0_offset.3 = add i64 %quants0_offset.2, 64
  %quants0_at.1 = getelementptr i8, ptr %slab_at.1, i64 %quants0_offset.3
  %word_bits = load <16 x i32>, ptr %quants0_at.1, align 32
  %shift_lane = insertelement <16 x i32> poison, i32 %shift.1, i64 0
  %shift_lanes = shufflevector <16 x i32> %shift_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted = lshr <16 x i32> %word_bits, %shift_lanes
  %quant0 = call <16 x float> @quant_q4_0(<16 x i32> %shifted)
  %shifted.1 = lshr <16 x i32> %shifted, splat (i32 8)
  %quant1 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.1)
  %shifted.2 = lshr <16 x i32> %shifted, splat (i32 16)
  %quant2 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.2)
  %shifted.3 = lshr <16 x i32> %shifted, splat (i32 24)
  %quant3 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.3)
  %sum0.0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant0, <16 x float> %sum0.0.panel)
  %sum0.1 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant1, <16 x float> %sum0.1.panel)
  %sum0.2 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant2, <16 x float> %sum0.2.panel)
  %sum0.3 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant3, <16 x float> %sum0.3.panel)
  %word_at = getelementptr <16 x i32>, ptr %quants0_at.1, i64 1
  %word_bits.1 = load <16 x i32>, ptr %word_at, align 32
  %shift_lane.1 = insertelement <16 x i32> poison, i32 %shift.1, i64 0
  %shift_lanes.1 = shufflevector <16 x i32> %shift_lane.1, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.4 = lshr <16 x i32> %word_bits.1, %shift_lanes.1
  %quant0.1 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.4)
  %shifted.5 = lshr <16 x i32> %shifted.4, splat (i32 8)
  %quant1.1 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.5)
  %shifted.6 = lshr <16 x i32> %shifted.4, splat (i32 16)
  %quant2.1 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.6)
  %shifted.7 = lshr <16 x i32> %shifted.4, splat (i32 24)
  %quant3.1 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.7)
  %sum0.4 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant0.1, <16 x float> %sum0.4.panel)
  %sum0.5 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant1.1, <16 x float> %sum0.5.panel)
  %sum0.6 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant2.1, <16 x float> %sum0.6.panel)
  %sum0.7 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant3.1, <16 x float> %sum0.7.panel)
  %word_at.1 = getelementptr <16 x i32>, ptr %quants0_at.1, i64 2
  %word_bits.2 = load <16 x i32>, ptr %word_at.1, align 32
  %shift_lane.2 = insertelement <16 x i32> poison, i32 %shift.1, i64 0
  %shift_lanes.2 = shufflevector <16 x i32> %shift_lane.2, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.8 = lshr <16 x i32> %word_bits.2, %shift_lanes.2
  %quant0.2 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.8)
  %shifted.9 = lshr <16 x i32> %shifted.8, splat (i32 8)
  %quant1.2 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.9)
  %shifted.10 = lshr <16 x i32> %shifted.8, splat (i32 16)
  %quant2.2 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.10)
  %shifted.11 = lshr <16 x i32> %shifted.8, splat (i32 24)
  %quant3.2 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.11)
  %sum0.8 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant0.2, <16 x float> %sum0.8.panel)
  %sum0.9 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant1.2, <16 x float> %sum0.9.panel)
  %sum0.10 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant2.2, <16 x float> %sum0.10.panel)
  %sum0.11 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant3.2, <16 x float> %sum0.11.panel)
  %word_at.2 = getelementptr <16 x i32>, ptr %quants0_at.1, i64 3
  %word_bits.3 = load <16 x i32>, ptr %word_at.2, align 32
  %shift_lane.3 = insertelement <16 x i32> poison, i32 %shift.1, i64 0
  %shift_lanes.3 = shufflevector <16 x i32> %shift_lane.3, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.12 = lshr <16 x i32> %word_bits.3, %shift_lanes.3
  %quant0.3 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.12)
  %shifted.13 = lshr <16 x i32> %shifted.12, splat (i32 8)
  %quant1.3 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.13)
  %shifted.14 = lshr <16 x i32> %shifted.12, splat (i32 16)
  %quant2.3 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.14)
  %shifted.15 = lshr <16 x i32> %shifted.12, splat (i32 24)
  %quant3.3 = call <16 x float> @quant_q4_0(<16 x i32> %shifted.15)
  %sum0.12 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant0.3, <16 x float> %sum0.12.panel)
  %sum0.13 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant1.3, <16 x float> %sum0.13.panel)
  %sum0.14 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant2.3, <16 x float> %sum0.14.panel)
  %sum0.15 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_scaled, <16 x float> %quant3.3, <16 x float> %sum0.15.panel)
  %panel.next = add i64 %panel, 1
  br label %panel.head
panel.done:
  store <16 x float> %sum0.0.panel, ptr %lanes, align 64
  %lanes_at = getelementptr <16 x float>, ptr %lanes, i64 1
  store <16 x float> %sum0.1.panel, ptr %lanes_at, align 64
  %lanes_at.1 = getelementptr <16 x float>, ptr %lanes, i64 2
  store <16 x float> %sum0.2.panel, ptr %lanes_at.1, align 64
  %lanes_at.2 = getelementptr <16 x float>, ptr %lanes, i64 3
  store <16 x float> %sum0.3.panel, ptr %lanes_at.2, align 64
  %lanes_at.3 = getelementptr <16 x float>, ptr %lanes, i64 4
  store <16 x float> %sum0.4.panel, ptr %lanes_at.3, align 64
  %lanes_at.4 = getelementptr <16 x float>, ptr %lanes, i64 5
  store <16 x float> %sum0.5.panel, ptr %lanes_at.4, align 64
  %lanes_at.5 = getelementptr <16 x float>, ptr %lanes, i64 6
  store <16 x float> %sum0.6.panel, ptr %lanes_at.5, align 64
  %lanes_at.6 = getelementptr <16 x float>, ptr %lanes, i64 7
  store <16 x float> %sum0.7.panel, ptr %lanes_at.6, align 64
  %lanes_at.7 = getelementptr <16 x float>, ptr %lanes, i64 8
  store <16 x float> %sum0.8.panel, ptr %lanes_at.7, align 64
  %lanes_at.8 = getelementptr <16 x float>, ptr %lanes, i64 9
  store <16 x float> %sum0.9.panel, ptr %lanes_at.8, align 64
  %lanes_at.9 = getelementptr <16 x float>, ptr %lanes, i64 10
  store <16 x float> %sum0.10.panel, ptr %lanes_at.9, align 64
  %lanes_at.10 = getelementptr <16 x float>, ptr %lanes, i64 11
  store <16 x float> %sum0.11.panel, ptr %lanes_at.10, align 64
  %lanes_at.11 = getelementptr <16 x float>, ptr %lanes, i64 12
  store <16 x float> %sum0.12.panel, ptr %lanes_at.11, align 64
  %lanes_at.12 = getelementptr <16 x float>, ptr %lanes, i64 13
  store <16 x float> %sum0.13.panel, ptr %lanes_at.12, align 64
  %lanes_at.13 = getelementptr <16 x float>, ptr %lanes, i64 14
  store <16 x float> %sum0.14.panel, ptr %lanes_at.13, align 64
  %lanes_at.14 = getelementptr <16 x float>, ptr %lanes, i64 15
  store <16 x float> %sum0.15.panel, ptr %lanes_at.14, align 64
  %part = call <16 x float> @sum_of_lanes(ptr %lanes)
  store <16 x float> %part, ptr %parts, align 64
  ret void
}

; %rows of y times 16 · %count rows of Q4_0 from 16 · %chunk on; N = 2000.
; 125 panels of 576 bytes; rows of y are 2000 floats apart.
define internal void @q4_0_t_k64_n2000_rows1_chunks4(ptr noalias %y, ptr noalias %w, ptr noalias %tile, i64 %chunk, i64 %count, i64 %rows) #0 {
entry:
  %parts = alloca [1 x <16 x float>], align 64
  br label %stretch.head
stretch.head:
  %stretch = phi i64 [ 0, %entry ], [ %stretch.next, %c.done ]
  %stretch.more = icmp slt i64 %stretch, 125
  br i1 %stretch.more, label %stretch.body, label %stretch.done
stretch.body:
  %beyond = add i64 %stretch, 64
  %is_first = icmp eq i64 %stretch, 0
  %stretch_end = call i64 @llvm.smin.i64(i64 %beyond, i64 125)
  br label %c.head
c.head:
  %c = phi i64 [ 0, %stretch.body ], [ %c.next, %row.done ]
  %c.more = icmp slt i64 %c, %count
  br i1 %c.more, label %c.body, label %c.done
c.body:
  %number = add i64 %chunk, %c
  call void @q4_0_t_k64_n2000_rows1_chunks4_stretch(ptr %y, ptr %w, ptr %parts, i64 %stretch, i64 %stretch_end, i64 %number, i64 %rows)
  br label %row.head
row.head:
  %row = phi i64 [ 0, %c.body ], [ %row.next, %row.body ]
  %row.more = icmp slt i64 %row, %rows
  br i1 %row.more, label %row.body, label %row.done
row.body:
  %part_at = getelementptr <16 x float>, ptr %parts, i64 %row
  %part = load <16 x float>, ptr %part_at, align 64
  %position = mul i64 %row, 4
  %position.1 = add i64 %position, %c
  %sum_at = getelementptr [2 x <16 x float>], ptr %tile, i64 %position.1
  %lost_at = getelementptr <16 x float>, ptr %sum_at, i64 1
  %total = load <16 x float>, ptr %sum_at, align 64
  %lost = load <16 x float>, ptr %lost_at, align 64
  %total.1 = select i1 %is_first, <16 x float> zeroinitializer, <16 x float> %total
  %lost.1 = select i1 %is_first, <16 x float> zeroinitializer, <16 x float> %lost
  %new = fadd <16 x float> %total.1, %part
  %added = fsub <16 x float> %new, %total.1
  %before = fsub <16 x float> %new, %added
  %lost_of_total = fsub <16 x float> %total.1, %before
  %lost_of_part = fsub <16 x float> %part, %added
  %lost_now = fadd <16 x float> %lost_of_total, %lost_of_part
  %lost.2 = fadd <16 x float> %lost.1, %lost_now
  store <16 x float> %new, ptr %sum_at, align 64
  store <16 x float> %lost.2, ptr %lost_at, align 64
  %row.next = add i64 %row, 1
  br label %row.head
row.done:
  %c.next = add i64 %c, 1
  br label %c.head
c.done:
  %stretch.next = add i64 %stretch, 64
  br label %stretch.head
stretch.done:
  ; each sum moves to the front, behind those that have moved
  %used = mul i64 %rows, 4
  br label %i.head
i.head:
  %i = phi i64 [ 0, %stretch.done ], [ %i.next, %i.body ]
  %i.more = icmp slt i64 %i, %used
  br i1 %i.more, label %i.body, label %i.done
i.body:
  %sum_at.1 = getelementptr [2 x <16 x float>], ptr %tile, i64 %i
  %total.2 = load <16 x float>, ptr %sum_at.1, align 64
  %lost_at.1 = getelementptr <16 x float>, ptr %sum_at.1, i64 1
  %lost.3 = load <16 x float>, ptr %lost_at.1, align 64
  %magnitude = call <16 x float> @llvm.fabs.v16f32(<16 x float> %lost.3)
  %finite = fcmp olt <16 x float> %magnitude, splat (float 0x7FF0000000000000)  ; not Inf − Inf
  %kept = select <16 x i1> %finite, <16 x float> %lost.3, <16 x float> zeroinitializer
  %total.3 = fadd <16 x float> %total.2, %kept
  %total_at = getelementptr <16 x float>, ptr %tile, i64 %i
  store <16 x float> %total.3, ptr %total_at, align 64
  %i.next = add i64 %i, 1
  br label %i.head
i.done:
  ret void
}

; 64 of 64 columns for rows %first … %end: 1 product and the epilogue.
define internal void @q4jit_product.section0(ptr %args, i64 %task, i64 %first, i64 %end) #0 {
entry:
  %prologue_slot = getelementptr %Slots, ptr %args, i64 0, i32 5
  %prologue = load ptr, ptr %prologue_slot, align 8
  %w_slot = getelementptr %Slots, ptr %args, i64 0, i32 3
  %w = load ptr, ptr %w_slot, align 8
  %row_factors_slot = getelementptr %Slots, ptr %args, i64 0, i32 6
  %row_factors = load ptr, ptr %row_factors_slot, align 8
  %output0_slot = getelementptr %Slots, ptr %args, i64 0, i32 4
  %output0 = load ptr, ptr %output0_slot, align 8
  %tile = alloca [4 x [2 x <16 x float>]], align 64
  br label %tile_row.head
tile_row.head:
  %tile_row = phi i64 [ %first, %entry ], [ %tile_row.next, %panel.done ]
  %tile_row.more = icmp slt i64 %tile_row, %end
  br i1 %tile_row.more, label %tile_row.body, label %tile_row.done
tile_row.body:
  %x_offset = mul i64 %tile_row, 2000
  %x_at = getelementptr float, ptr %prologue, i64 %x_offset
  %chunk = mul i64 %task, 4
  call void @q4_0_t_k64_n2000_rows1_chunks4(ptr %x_at, ptr %w, ptr %tile, i64 %chunk, i64 4, i64 1)
  br label %panel.head
panel.head:
  %panel = phi i64 [ 0, %tile_row.body ], [ %panel.next, %panel.body ]
  %panel.more = icmp slt i64 %panel, 4
  br i1 %panel.more, label %panel.body, label %panel.done
panel.body:
  %column = mul i64 %task, 64
  %column.1 = mul i64 %panel, 16
  %column.2 = add i64 %column, %column.1
  %start = mul i64 %panel, 16
  %sums_at = getelementptr float, ptr %tile, i64 %start
  %sums = load <16 x float>, ptr %sums_at, align 4
  %row_factor_at = getelementptr float, ptr %row_factors, i64 %tile_row
  %row_factor = load float, ptr %row_factor_at, align 4
  %row_factor_lane = insertelement <16 x float> poison, float %row_factor, i64 0
  %row_factor_lanes = shufflevector <16 x float> %row_factor_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %product = fmul <16 x float> %sums, %row_factor_lanes
  %output0_offset = mul i64 %tile_row, 64
  %output0_row_at = getelementptr float, ptr %output0, i64 %output0_offset
  %output0_at = getelementptr float, ptr %output0_row_at, i64 %column.2
  store <16 x float> %product, ptr %output0_at, align 4
  %panel.next = add i64 %panel, 1
  br label %panel.head
panel.done:
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
  %below = icmp slt i64 %number, 1
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
  call void @parallel_for(ptr %pool, ptr @q4jit_product.rows, ptr %args, i64 %m, i64 4)
  call void @parallel_for(ptr %pool, ptr @q4jit_product.columns, ptr %args, i64 1, i64 1)
  ret void
}

declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare i32 @llvm.smax.i32(i32, i32)
declare i32 @llvm.smin.i32(i32, i32)
declare i64 @llvm.smin.i64(i64, i64)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

attributes #0 = { nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }
attributes #1 = { alwaysinline nounwind }

!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}
