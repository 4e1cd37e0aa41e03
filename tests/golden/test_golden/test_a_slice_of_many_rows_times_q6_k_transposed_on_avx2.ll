; product for cpu:x86-64-v3, 6 rows a tile of 64 columns, made by q4jit
; rows:
;   v0 = y
; 195 columns, transposed:
;   v2 = v0 @ w.T[:, 5:200]    Q6_K [256, 2000]
;   output0 = v2

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
  %y_offset = mul i64 %row, 2000
  %y_row_at = getelementptr float, ptr %y, i64 %y_offset
  %y_at = getelementptr float, ptr %y_row_at, i64 %column
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

; Q6_K: the quant in the lowest bits of each lane, as a float.
define internal <16 x float> @quant_q6_k(<16 x i32> %bits0) #1 {
entry:
  %code = and <16 x i32> %bits0, splat (i32 63)
  %int = sub <16 x i32> %code, splat (i32 32)
  %quant = sitofp <16 x i32> %int to <16 x float>
  ret <16 x float> %quant
}

; The sums over panels %first … %end of y times the rows of 1 chunks of K.
define internal void @q6_k_t_k256_n2000_rows6_chunks5_stretch(ptr noalias %y, ptr noalias %w, ptr noalias %parts, i64 %first, i64 %end, i64 %chunk, i64 %rows) #0 {
entry:
  %decoded = alloca [128 x <16 x float>], align 64
  %block = udiv i64 %chunk, 16
  %chunk_in_block = urem i64 %chunk, 16
  %slab_offset = mul i64 %block, 3360
  %slabs_at = getelementptr i8, ptr %w, i64 %slab_offset
  br label %panel.head
panel.head:
  %panel = phi i64 [ %first, %entry ], [ %panel.next, %panel.body ]
  %panel.more = icmp slt i64 %panel, %end
  br i1 %panel.more, label %panel.body, label %panel.done
panel.body:
  %panel_offset = mul i64 %panel, 3360
  %slab_at = getelementptr i8, ptr %slabs_at, i64 %panel_offset
  %block_scale = call <16 x float> @load_f16_v16f32(ptr %slab_at)
  %scale_offset = mul i64 %chunk_in_block, 16
  %scales_at = getelementptr i8, ptr %slab_at, i64 32
  %sub_scale_at = getelementptr i8, ptr %scales_at, i64 %scale_offset
  %scale_bytes = load <16 x i8>, ptr %sub_scale_at, align 1
  %scale_ints = sext <16 x i8> %scale_bytes to <16 x i32>
  %sub_scale = sitofp <16 x i32> %scale_ints to <16 x float>
  %scale = fmul <16 x float> %block_scale, %sub_scale
  %run = udiv i64 %chunk_in_block, 2
  %in_run = urem i64 %chunk_in_block, 2
  %plane_byte = mul i64 %run, 16
  %layer32 = trunc i64 %in_run to i32
  %shift = mul i32 %layer32, 4
  %quants0_at = getelementptr i8, ptr %slab_at, i64 288
  %chunk_offset = mul i64 %plane_byte, 16
  %chunk_at = getelementptr i8, ptr %quants0_at, i64 %chunk_offset
  %run.1 = udiv i64 %chunk_in_block, 2
  %in_run.1 = urem i64 %chunk_in_block, 2
  %plane_byte.1 = mul i64 %run.1, 8
  %layer32.1 = trunc i64 %in_run.1 to i32
  %shift.1 = mul i32 %layer32.1, 4
  %quants1_at = getelementptr i8, ptr %slab_at, i64 2336
  %chunk_offset.1 = mul i64 %plane_byte.1, 16
  %chunk_at.1 = getelementptr i8, ptr %quants1_at, i64 %chunk_offset.1
  %later = add i64 %panel, 8
  %panel_offset.1 = mul i64 %later, 3360
  %slab_at.1 = getelementptr i8, ptr %slabs_at, i64 %panel_offset.1
  ; prefetch a later panel
  %run.2 = udiv i64 %chunk_in_block, 2
  %in_run.2 = urem i64 %chunk_in_block, 2
  %plane_byte.2 = mul i64 %run.2, 16
  %layer32.2 = trunc i64 %in_run.2 to i32
  %shift.2 = mul i32 %layer32.2, 4
  %quants0_at.1 = getelementptr i8, ptr %slab_at.1, i64 288
  %chunk_offset.2 = mul i64 %plane_byte.2, 16
  %chunk_at.2 = getelementptr i8, ptr %quants0_at.1, i64 %chunk_offset.2
  %run.3 = udiv i64 %chunk_in_block, 2
  %in_run.3 = urem i64 %chunk_in_block, 2
  %plane_byte.3 = mul i64 %run.3, 8
  %layer32.3 = trunc i64 %in_run.3 to i32
  %shift.3 = mul i32 %layer32.3, 4
  %quants1_at.1 = getelementptr i8, ptr %slab_at.1, i64 2336
  %chunk_offset.3 = mul i64 %plane_byte.3, 16
  %chunk_at.3 = getelementptr i8, ptr %quants1_at.1, i64 %chunk_offset.3
  %scale_offset.1 = mul i64 %chunk_in_block, 16
  %scales_at.1 = getelementptr i8, ptr %slab_at.1, i64 32
  %scale_at = getelementptr i8, ptr %scales_at.1, i64 %scale_offset.1
  %bit = zext i32 %shift.2 to i64
  %own_offset = mul i64 %bit, 32
  %own_at = getelementptr i8, ptr %chunk_at.2, i64 %own_offset
  %bit.1 = zext i32 %shift.3 to i64
  %own_offset.1 = mul i64 %bit.1, 16
  %own_at.1 = getelementptr i8, ptr %chunk_at.3, i64 %own_offset.1
  call void @llvm.prefetch.p0(ptr %slab_at.1, i32 0, i32 2, i32 1)  ; read, second level
  call void @llvm.prefetch.p0(ptr %scale_at, i32 0, i32 2, i32 1)  ; read, second level
  call void @llvm.prefetch.p0(ptr %own_at, i32 0, i32 2, i32 1)  ; read, second level
  %ahead_at = getelementptr i8, ptr %own_at, i64 64
  call void @llvm.prefetch.p0(ptr %ahead_at, i32 0, i32 2, i32 1)  ; read, second level
  %ahead_at.1 = getelementptr i8, ptr %own_at, i64 127
  call void @llvm.prefetch.p0(ptr %ahead_at.1, i32 0, i32 2, i32 1)  ; read, second level
  call void @llvm.prefetch.p0(ptr %own_at.1, i32 0, i32 2, i32 1)  ; read, second level
  %ahead_at.2 = getelementptr i8, ptr %own_at.1, i64 63
  call void @llvm.prefetch.p0(ptr %ahead_at.2, i32 0, i32 2, i32 1)  ; read, second level
  %word_bits = load <16 x i32>, ptr %chunk_at, align 32
  %shift_lane = insertelement <16 x i32> poison, i32 %shift, i64 0
  %shift_lanes = shufflevector <16 x i32> %shift_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted = lshr <16 x i32> %word_bits, %shift_lanes
  %codes = and <16 x i32> %shifted, splat (i32 u0x0F0F0F0F)  ; the lowest 4 bits of each byte
  %word_bits.1 = load <16 x i32>, ptr %chunk_at.1, align 32
  %shift_lane.1 = insertelement <16 x i32> poison, i32 %shift.1, i64 0
  %shift_lanes.1 = shufflevector <16 x i32> %shift_lane.1, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.1 = lshr <16 x i32> %word_bits.1, %shift_lanes.1
  %codes.1 = and <16 x i32> %shifted.1, splat (i32 u0x03030303)  ; the lowest 2 bits of each byte
  %codes.2 = shl <16 x i32> %codes.1, splat (i32 4)
  %codes.3 = or <16 x i32> %codes, %codes.2
  %quant0 = call <16 x float> @quant_q6_k(<16 x i32> %codes.3)
  %shifted.2 = lshr <16 x i32> %codes.3, splat (i32 8)
  %quant1 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.2)
  %shifted.3 = lshr <16 x i32> %codes.3, splat (i32 16)
  %quant2 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.3)
  %shifted.4 = lshr <16 x i32> %codes.3, splat (i32 24)
  %quant3 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.4)
  %value = fmul <16 x float> %scale, %quant0
  %value.1 = fmul <16 x float> %scale, %quant1
  %value.2 = fmul <16 x float> %scale, %quant2
  %value.3 = fmul <16 x float> %scale, %quant3
  %word_at = getelementptr <16 x i32>, ptr %chunk_at, i64 1
  %word_bits.2 = load <16 x i32>, ptr %word_at, align 32
  %shift_lane.2 = insertelement <16 x i32> poison, i32 %shift, i64 0
  %shift_lanes.2 = shufflevector <16 x i32> %shift_lane.2, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.5 = lshr <16 x i32> %word_bits.2, %shift_lanes.2
  %codes.4 = and <16 x i32> %shifted.5, splat (i32 u0x0F0F0F0F)  ; the lowest 4 bits of each byte
  %word_at.1 = getelementptr <16 x i32>, ptr %chunk_at.1, i64 1
  %word_bits.3 = load <16 x i32>, ptr %word_at.1, align 32
  %shift_lane.3 = insertelement <16 x i32> poison, i32 %shift.1, i64 0
  %shift_lanes.3 = shufflevector <16 x i32> %shift_lane.3, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.6 = lshr <16 x i32> %word_bits.3, %shift_lanes.3
  %codes.5 = and <16 x i32> %shifted.6, splat (i32 u0x03030303)  ; the lowest 2 bits of each byte
  %codes.6 = shl <16 x i32> %codes.5, splat (i32 4)
  %codes.7 = or <16 x i32> %codes.4, %codes.6
  %quant0.1 = call <16 x float> @quant_q6_k(<16 x i32> %codes.7)
  %shifted.7 = lshr <16 x i32> %codes.7, splat (i32 8)
  %quant1.1 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.7)
  %shifted.8 = lshr <16 x i32> %codes.7, splat (i32 16)
  %quant2.1 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.8)
  %shifted.9 = lshr <16 x i32> %codes.7, splat (i32 24)
  %quant3.1 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.9)
  %value.4 = fmul <16 x float> %scale, %quant0.1
  %value.5 = fmul <16 x float> %scale, %quant1.1
  %value.6 = fmul <16 x float> %scale, %quant2.1
  %value.7 = fmul <16 x float> %scale, %quant3.1
  %word_at.2 = getelementptr <16 x i32>, ptr %chunk_at, i64 2
  %word_bits.4 = load <16 x i32>, ptr %word_at.2, align 32
  %shift_lane.4 = insertelement <16 x i32> poison, i32 %shift, i64 0
  %shift_lanes.4 = shufflevector <16 x i32> %shift_lane.4, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.10 = lshr <16 x i32> %word_bits.4, %shift_lanes.4
  %codes.8 = and <16 x i32> %shifted.10, splat (i32 u0x0F0F0F0F)  ; the lowest 4 bits of each byte
  %word_shift = add i32 %shift.1, 2
  %word_bits.5 = load <16 x i32>, ptr %chunk_at.1, align 32
  %word_shift_lane = insertelement <16 x i32> poison, i32 %word_shift, i64 0
  %word_shift_lanes = shufflevector <16 x i32> %word_shift_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.11 = lshr <16 x i32> %word_bits.5, %word_shift_lanes
  %codes.9 = and <16 x i32> %shifted.11, splat (i32 u0x03030303)  ; the lowest 2 bits of each byte
  %codes.10 = shl <16 x i32> %codes.9, splat (i32 4)
  %codes.11 = or <16 x i32> %codes.8, %codes.10
  %quant0.2 = call <16 x float> @quant_q6_k(<16 x i32> %codes.11)
  %shifted.12 = lshr <16 x i32> %codes.11, splat (i32 8)
  %quant1.2 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.12)
  %shifted.13 = lshr <16 x i32> %codes.11, splat (i32 16)
  %quant2.2 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.13)
  %shifted.14 = lshr <16 x i32> %codes.11, splat (i32 24)
  %quant3.2 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.14)
  %value.8 = fmul <16 x float> %scale, %quant0.2
  %value.9 = fmul <16 x float> %scale, %quant1.2
  %value.10 = fmul <16 x float> %scale, %quant2.2
  %value.11 = fmul <16 x float> %scale, %quant3.2
  %word_at.3 = getelementptr <16 x i32>, ptr %chunk_at, i64 3
  %word_bits.6 = load <16 x i32>, ptr %word_at.3, align 32
  %shift_lane.5 = insertelement <16 x i32> poison, i32 %shift, i64 0
  %shift_lanes.5 = shufflevector <16 x i32> %shift_lane.5, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.15 = lshr <16 x i32> %word_bits.6, %shift_lanes.5
  %codes.12 = and <16 x i32> %shifted.15, splat (i32 u0x0F0F0F0F)  ; the lowest 4 bits of each byte
  %word_shift.1 = add i32 %shift.1, 2
  %word_at.4 = getelementptr <16 x i32>, ptr %chunk_at.1, i64 1
  %word_bits.7 = load <16 x i32>, ptr %word_at.4, align 32
  %word_shift_lane.1 = insertelement <16 x i32> poison, i32 %word_shift.1, i64 0
  %word_shift_lanes.1 = shufflevector <16 x i32> %word_shift_lane.1, <16 x i32> poison, <16 x i32> zeroinitializer
  %shifted.16 = lshr <16 x i32> %word_bits.7, %word_shift_lanes.1
  %codes.13 = and <16 x i32> %shifted.16, splat (i32 u0x03030303)  ; the lowest 2 bits of each byte
  %codes.14 = shl <16 x i32> %codes.13, splat (i32 4)
  %codes.15 = or <16 x i32> %codes.12, %codes.14
  %quant0.3 = call <16 x float> @quant_q6_k(<16 x i32> %codes.15)
  %shifted.17 = lshr <16 x i32> %codes.15, splat (i32 8)
  %quant1.3 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.17)
  %shifted.18 = lshr <16 x i32> %codes.15, splat (i32 16)
  %quant2.3 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.18)
  %shifted.19 = lshr <16 x i32> %codes.15, splat (i32 24)
  %quant3.3 = call <16 x float> @quant_q6_k(<16 x i32> %shifted.19)
  %value.12 = fmul <16 x float> %scale, %quant0.3
  %value.13 = fmul <16 x float> %scale, %quant1.3
  %value.14 = fmul <16 x float> %scale, %quant2.3
  %value.15 = fmul <16 x float> %scale, %quant3.3
  %in_stretch = sub i64 %panel, %first
  %column = mul i64 %in_stretch, 16
  %decoded_at = getelementptr <16 x float>, ptr %decoded, i64 %column
  %swapped = shufflevector <16 x float> %value, <16 x float> %value.8, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %swapped.1 = shufflevector <16 x float> %value, <16 x float> %value.8, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %swapped.2 = shufflevector <16 x float> %value.1, <16 x float> %value.9, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %swapped.3 = shufflevector <16 x float> %value.1, <16 x float> %value.9, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %swapped.4 = shufflevector <16 x float> %value.2, <16 x float> %value.10, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %swapped.5 = shufflevector <16 x float> %value.2, <16 x float> %value.10, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %swapped.6 = shufflevector <16 x float> %value.3, <16 x float> %value.11, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %swapped.7 = shufflevector <16 x float> %value.3, <16 x float> %value.11, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %swapped.8 = shufflevector <16 x float> %value.4, <16 x float> %value.12, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %swapped.9 = shufflevector <16 x float> %value.4, <16 x float> %value.12, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %swapped.10 = shufflevector <16 x float> %value.5, <16 x float> %value.13, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %swapped.11 = shufflevector <16 x float> %value.5, <16 x float> %value.13, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %swapped.12 = shufflevector <16 x float> %value.6, <16 x float> %value.14, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %swapped.13 = shufflevector <16 x float> %value.6, <16 x float> %value.14, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %swapped.14 = shufflevector <16 x float> %value.7, <16 x float> %value.15, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 16, i32 17, i32 18, i32 19, i32 20, i32 21, i32 22, i32 23>
  %swapped.15 = shufflevector <16 x float> %value.7, <16 x float> %value.15, <16 x i32> <i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15, i32 24, i32 25, i32 26, i32 27, i32 28, i32 29, i32 30, i32 31>
  %swapped.16 = shufflevector <16 x float> %swapped, <16 x float> %swapped.8, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 16, i32 17, i32 18, i32 19, i32 8, i32 9, i32 10, i32 11, i32 24, i32 25, i32 26, i32 27>
  %swapped.17 = shufflevector <16 x float> %swapped, <16 x float> %swapped.8, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 20, i32 21, i32 22, i32 23, i32 12, i32 13, i32 14, i32 15, i32 28, i32 29, i32 30, i32 31>
  %swapped.18 = shufflevector <16 x float> %swapped.2, <16 x float> %swapped.10, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 16, i32 17, i32 18, i32 19, i32 8, i32 9, i32 10, i32 11, i32 24, i32 25, i32 26, i32 27>
  %swapped.19 = shufflevector <16 x float> %swapped.2, <16 x float> %swapped.10, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 20, i32 21, i32 22, i32 23, i32 12, i32 13, i32 14, i32 15, i32 28, i32 29, i32 30, i32 31>
  %swapped.20 = shufflevector <16 x float> %swapped.4, <16 x float> %swapped.12, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 16, i32 17, i32 18, i32 19, i32 8, i32 9, i32 10, i32 11, i32 24, i32 25, i32 26, i32 27>
  %swapped.21 = shufflevector <16 x float> %swapped.4, <16 x float> %swapped.12, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 20, i32 21, i32 22, i32 23, i32 12, i32 13, i32 14, i32 15, i32 28, i32 29, i32 30, i32 31>
  %swapped.22 = shufflevector <16 x float> %swapped.6, <16 x float> %swapped.14, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 16, i32 17, i32 18, i32 19, i32 8, i32 9, i32 10, i32 11, i32 24, i32 25, i32 26, i32 27>
  %swapped.23 = shufflevector <16 x float> %swapped.6, <16 x float> %swapped.14, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 20, i32 21, i32 22, i32 23, i32 12, i32 13, i32 14, i32 15, i32 28, i32 29, i32 30, i32 31>
  %swapped.24 = shufflevector <16 x float> %swapped.1, <16 x float> %swapped.9, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 16, i32 17, i32 18, i32 19, i32 8, i32 9, i32 10, i32 11, i32 24, i32 25, i32 26, i32 27>
  %swapped.25 = shufflevector <16 x float> %swapped.1, <16 x float> %swapped.9, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 20, i32 21, i32 22, i32 23, i32 12, i32 13, i32 14, i32 15, i32 28, i32 29, i32 30, i32 31>
  %swapped.26 = shufflevector <16 x float> %swapped.3, <16 x float> %swapped.11, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 16, i32 17, i32 18, i32 19, i32 8, i32 9, i32 10, i32 11, i32 24, i32 25, i32 26, i32 27>
  %swapped.27 = shufflevector <16 x float> %swapped.3, <16 x float> %swapped.11, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 20, i32 21, i32 22, i32 23, i32 12, i32 13, i32 14, i32 15, i32 28, i32 29, i32 30, i32 31>
  %swapped.28 = shufflevector <16 x float> %swapped.5, <16 x float> %swapped.13, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 16, i32 17, i32 18, i32 19, i32 8, i32 9, i32 10, i32 11, i32 24, i32 25, i32 26, i32 27>
  %swapped.29 = shufflevector <16 x float> %swapped.5, <16 x float> %swapped.13, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 20, i32 21, i32 22, i32 23, i32 12, i32 13, i32 14, i32 15, i32 28, i32 29, i32 30, i32 31>
  %swapped.30 = shufflevector <16 x float> %swapped.7, <16 x float> %swapped.15, <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 16, i32 17, i32 18, i32 19, i32 8, i32 9, i32 10, i32 11, i32 24, i32 25, i32 26, i32 27>
  %swapped.31 = shufflevector <16 x float> %swapped.7, <16 x float> %swapped.15, <16 x i32> <i32 4, i32 5, i32 6, i32 7, i32 20, i32 21, i32 22, i32 23, i32 12, i32 13, i32 14, i32 15, i32 28, i32 29, i32 30, i32 31>
  %swapped.32 = shufflevector <16 x float> %swapped.16, <16 x float> %swapped.20, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %swapped.33 = shufflevector <16 x float> %swapped.16, <16 x float> %swapped.20, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %swapped.34 = shufflevector <16 x float> %swapped.18, <16 x float> %swapped.22, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %swapped.35 = shufflevector <16 x float> %swapped.18, <16 x float> %swapped.22, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %swapped.36 = shufflevector <16 x float> %swapped.17, <16 x float> %swapped.21, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %swapped.37 = shufflevector <16 x float> %swapped.17, <16 x float> %swapped.21, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %swapped.38 = shufflevector <16 x float> %swapped.19, <16 x float> %swapped.23, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %swapped.39 = shufflevector <16 x float> %swapped.19, <16 x float> %swapped.23, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %swapped.40 = shufflevector <16 x float> %swapped.24, <16 x float> %swapped.28, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %swapped.41 = shufflevector <16 x float> %swapped.24, <16 x float> %swapped.28, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %swapped.42 = shufflevector <16 x float> %swapped.26, <16 x float> %swapped.30, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %swapped.43 = shufflevector <16 x float> %swapped.26, <16 x float> %swapped.30, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %swapped.44 = shufflevector <16 x float> %swapped.25, <16 x float> %swapped.29, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %swapped.45 = shufflevector <16 x float> %swapped.25, <16 x float> %swapped.29, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %swapped.46 = shufflevector <16 x float> %swapped.27, <16 x float> %swapped.31, <16 x i32> <i32 0, i32 1, i32 16, i32 17, i32 4, i32 5, i32 20, i32 21, i32 8, i32 9, i32 24, i32 25, i32 12, i32 13, i32 28, i32 29>
  %swapped.47 = shufflevector <16 x float> %swapped.27, <16 x float> %swapped.31, <16 x i32> <i32 2, i32 3, i32 18, i32 19, i32 6, i32 7, i32 22, i32 23, i32 10, i32 11, i32 26, i32 27, i32 14, i32 15, i32 30, i32 31>
  %swapped.48 = shufflevector <16 x float> %swapped.32, <16 x float> %swapped.34, <16 x i32> <i32 0, i32 16, i32 2, i32 18, i32 4, i32 20, i32 6, i32 22, i32 8, i32 24, i32 10, i32 26, i32 12, i32 28, i32 14, i32 30>
  %swapped.49 = shufflevector <16 x float> %swapped.32, <16 x float> %swapped.34, <16 x i32> <i32 1, i32 17, i32 3, i32 19, i32 5, i32 21, i32 7, i32 23, i32 9, i32 25, i32 11, i32 27, i32 13, i32 29, i32 15, i32 31>
  %swapped.50 = shufflevector <16 x float> %swapped.33, <16 x float> %swapped.35, <16 x i32> <i32 0, i32 16, i32 2, i32 18, i32 4, i32 20, i32 6, i32 22, i32 8, i32 24, i32 10, i32 26, i32 12, i32 28, i32 14, i32 30>
  %swapped.51 = shufflevector <16 x float> %swapped.33, <16 x float> %swapped.35, <16 x i32> <i32 1, i32 17, i32 3, i32 19, i32 5, i32 21, i32 7, i32 23, i32 9, i32 25, i32 11, i32 27, i32 13, i32 29, i32 15, i32 31>
  %swapped.52 = shufflevector <16 x float> %swapped.36, <16 x float> %swapped.38, <16 x i32> <i32 0, i32 16, i32 2, i32 18, i32 4, i32 20, i32 6, i32 22, i32 8, i32 24, i32 10, i32 26, i32 12, i32 28, i32 14, i32 30>
  %swapped.53 = shufflevector <16 x float> %swapped.36, <16 x float> %swapped.38, <16 x i32> <i32 1, i32 17, i32 3, i32 19, i32 5, i32 21, i32 7, i32 23, i32 9, i32 25, i32 11, i32 27, i32 13, i32 29, i32 15, i32 31>
  %swapped.54 = shufflevector <16 x float> %swapped.37, <16 x float> %swapped.39, <16 x i32> <i32 0, i32 16, i32 2, i32 18, i32 4, i32 20, i32 6, i32 22, i32 8, i32 24, i32 10, i32 26, i32 12, i32 28, i32 14, i32 30>
  %swapped.55 = shufflevector <16 x float> %swapped.37, <16 x float> %swapped.39, <16 x i32> <i32 1, i32 17, i32 3, i32 19, i32 5, i32 21, i32 7, i32 23, i32 9, i32 25, i32 11, i32 27, i32 13, i32 29, i32 15, i32 31>
  %swapped.56 = shufflevector <16 x float> %swapped.40, <16 x float> %swapped.42, <16 x i32> <i32 0, i32 16, i32 2, i32 18, i32 4, i32 20, i32 6, i32 22, i32 8, i32 24, i32 10, i32 26, i32 12, i32 28, i32 14, i32 30>
  %swapped.57 = shufflevector <16 x float> %swapped.40, <16 x float> %swapped.42, <16 x i32> <i32 1, i32 17, i32 3, i32 19, i32 5, i32 21, i32 7, i32 23, i32 9, i32 25, i32 11, i32 27, i32 13, i32 29, i32 15, i32 31>
  %swapped.58 = shufflevector <16 x float> %swapped.41, <16 x float> %swapped.43, <16 x i32> <i32 0, i32 16, i32 2, i32 18, i32 4, i32 20, i32 6, i32 22, i32 8, i32 24, i32 10, i32 26, i32 12, i32 28, i32 14, i32 30>
  %swapped.59 = shufflevector <16 x float> %swapped.41, <16 x float> %swapped.43, <16 x i32> <i32 1, i32 17, i32 3, i32 19, i32 5, i32 21, i32 7, i32 23, i32 9, i32 25, i32 11, i32 27, i32 13, i32 29, i32 15, i32 31>
  %swapped.60 = shufflevector <16 x float> %swapped.44, <16 x float> %swapped.46, <16 x i32> <i32 0, i32 16, i32 2, i32 18, i32 4, i32 20, i32 6, i32 22, i32 8, i32 24, i32 10, i32 26, i32 12, i32 28, i32 14, i32 30>
  %swapped.61 = shufflevector <16 x float> %swapped.44, <16 x float> %swapped.46, <16 x i32> <i32 1, i32 17, i32 3, i32 19, i32 5, i32 21, i32 7, i32 23, i32 9, i32 25, i32 11, i32 27, i32 13, i32 29, i32 15, i32 31>
  %swapped.62 = shufflevector <16 x float> %swapped.45, <16 x float> %swapped.47, <16 x i32> <i32 0, i32 16, i32 2, i32 18, i32 4, i32 20, i32 6, i32 22, i32 8, i32 24, i32 10, i32 26, i32 12, i32 28, i32 14, i32 30>
  %swapped.63 = shufflevector <16 x float> %swapped.45, <16 x float> %swapped.47, <16 x i32> <i32 1, i32 17, i32 3, i32 19, i32 5, i32 21, i32 7, i32 23, i32 9, i32 25, i32 11, i32 27, i32 13, i32 29, i32 15, i32 31>
  store <16 x float> %swapped.48, ptr %decoded_at, align 64
  %decoded_at.1 = getelementptr <16 x float>, ptr %decoded_at, i64 1
  store <16 x float> %swapped.49, ptr %decoded_at.1, align 64
  %decoded_at.2 = getelementptr <16 x float>, ptr %decoded_at, i64 2
  store <16 x float> %swapped.50, ptr %decoded_at.2, align 64
  %decoded_at.3 = getelementptr <16 x float>, ptr %decoded_at, i64 3
  store <16 x float> %swapped.51, ptr %decoded_at.3, align 64
  %decoded_at.4 = getelementptr <16 x float>, ptr %decoded_at, i64 4
  store <16 x float> %swapped.52, ptr %decoded_at.4, align 64
  %decoded_at.5 = getelementptr <16 x float>, ptr %decoded_at, i64 5
  store <16 x float> %swapped.53, ptr %decoded_at.5, align 64
  %decoded_at.6 = getelementptr <16 x float>, ptr %decoded_at, i64 6
  store <16 x float> %swapped.54, ptr %decoded_at.6, align 64
  %decoded_at.7 = getelementptr <16 x float>, ptr %decoded_at, i64 7
  store <16 x float> %swapped.55, ptr %decoded_at.7, align 64
  %decoded_at.8 = getelementptr <16 x float>, ptr %decoded_at, i64 8
  store <16 x float> %swapped.56, ptr %decoded_at.8, align 64
  %decoded_at.9 = getelementptr <16 x float>, ptr %decoded_at, i64 9
  store <16 x float> %swapped.57, ptr %decoded_at.9, align 64
  %decoded_at.10 = getelementptr <16 x float>, ptr %decoded_at, i64 10
  store <16 x float> %swapped.58, ptr %decoded_at.10, align 64
  %decoded_at.11 = getelementptr <16 x float>, ptr %decoded_at, i64 11
  store <16 x float> %swapped.59, ptr %decoded_at.11, align 64
  %decoded_at.12 = getelementptr <16 x float>, ptr %decoded_at, i64 12
  store <16 x float> %swapped.60, ptr %decoded_at.12, align 64
  %decoded_at.13 = getelementptr <16 x float>, ptr %decoded_at, i64 13
  store <16 x float> %swapped.61, ptr %decoded_at.13, align 64
  %decoded_at.14 = getelementptr <16 x float>, ptr %decoded_at, i64 14
  store <16 x float> %swapped.62, ptr %decoded_at.14, align 64
  %decoded_at.15 = getelementptr <16 x float>, ptr %decoded_at, i64 15
  store <16 x float> %swapped.63, ptr %decoded_at.15, align 64
  %panel.next = add i64 %panel, 1
  br label %panel.head
panel.done:
  %panels = sub i64 %end, %first
  %columns = mul i64 %panels, 16
  br label %tile_row.head
tile_row.head:
  %tile_row = phi i64 [ 0, %panel.done ], [ %tile_row.next, %n.done ]
  %tile_row.more = icmp slt i64 %tile_row, %rows
  br i1 %tile_row.more, label %tile_row.body, label %tile_row.done
tile_row.body:
  ; the last tile overlaps the one before it
  %last = sub i64 %rows, 6
  %first_row = call i64 @llvm.smin.i64(i64 %tile_row, i64 %last)
  %y_offset = mul i64 %first_row, 2000
  %y_offset.1 = mul i64 %first, 16
  %y_offset.2 = add i64 %y_offset, %y_offset.1
  %y_at = getelementptr float, ptr %y, i64 %y_offset.2
  %parts_at = getelementptr <16 x float>, ptr %parts, i64 %first_row
  br label %n.head
n.head:
  %n = phi i64 [ 0, %tile_row.body ], [ %n.next, %n.body ]
  %sum0.0.n = phi <16 x float> [ zeroinitializer, %tile_row.body ], [ %sum0.0, %n.body ]
  %sum1.0.n = phi <16 x float> [ zeroinitializer, %tile_row.body ], [ %sum1.0, %n.body ]
  %sum2.0.n = phi <16 x float> [ zeroinitializer, %tile_row.body ], [ %sum2.0, %n.body ]
  %sum3.0.n = phi <16 x float> [ zeroinitializer, %tile_row.body ], [ %sum3.0, %n.body ]
  %sum4.0.n = phi <16 x float> [ zeroinitializer, %tile_row.body ], [ %sum4.0, %n.body ]
  %sum5.0.n = phi <16 x float> [ zeroinitializer, %tile_row.body ], [ %sum5.0, %n.body ]
  %n.more = icmp slt i64 %n, %columns
  br i1 %n.more, label %n.body, label %n.done
n.body:
  %decoded_at.16 = getelementptr <16 x float>, ptr %decoded, i64 %n
  %weight = load <16 x float>, ptr %decoded_at.16, align 64
  %y_at.1 = getelementptr float, ptr %y_at, i64 %n
  %y.1 = load float, ptr %y_at.1, align 4
  %y_lane = insertelement <16 x float> poison, float %y.1, i64 0
  %y_lanes = shufflevector <16 x float> %y_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %sum0.0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_lanes, <16 x float> %weight, <16 x float> %sum0.0.n)
  %y_offset.3 = add i64 %n, 2000
  %y_at.2 = getelementptr float, ptr %y_at, i64 %y_offset.3
  %y.2 = load float, ptr %y_at.2, align 4
  %y_lane.1 = insertelement <16 x float> poison, float %y.2, i64 0
  %y_lanes.1 = shufflevector <16 x float> %y_lane.1, <16 x float> poison, <16 x i32> zeroinitializer
  %sum1.0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_lanes.1, <16 x float> %weight, <16 x float> %sum1.0.n)
  %y_offset.4 = add i64 %n, 4000
  %y_at.3 = getelementptr float, ptr %y_at, i64 %y_offset.4
  %y.3 = load float, ptr %y_at.3, align 4
  %y_lane.2 = insertelement <16 x float> poison, float %y.3, i64 0
  %y_lanes.2 = shufflevector <16 x float> %y_lane.2, <16 x float> poison, <16 x i32> zeroinitializer
  %sum2.0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_lanes.2, <16 x float> %weight, <16 x float> %sum2.0.n)
  %y_offset.5 = add i64 %n, 6000
  %y_at.4 = getelementptr float, ptr %y_at, i64 %y_offset.5
  %y.4 = load float, ptr %y_at.4, align 4
  %y_lane.3 = insertelement <16 x float> poison, float %y.4, i64 0
  %y_lanes.3 = shufflevector <16 x float> %y_lane.3, <16 x float> poison, <16 x i32> zeroinitializer
  %sum3.0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_lanes.3, <16 x float> %weight, <16 x float> %sum3.0.n)
  %y_offset.6 = add i64 %n, 8000
  %y_at.5 = getelementptr float, ptr %y_at, i64 %y_offset.6
  %y.5 = load float, ptr %y_at.5, align 4
  %y_lane.4 = insertelement <16 x float> poison, float %y.5, i64 0
  %y_lanes.4 = shufflevector <16 x float> %y_lane.4, <16 x float> poison, <16 x i32> zeroinitializer
  %sum4.0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_lanes.4, <16 x float> %weight, <16 x float> %sum4.0.n)
  %y_offset.7 = add i64 %n, 10000
  %y_at.6 = getelementptr float, ptr %y_at, i64 %y_offset.7
  %y.6 = load float, ptr %y_at.6, align 4
  %y_lane.5 = insertelement <16 x float> poison, float %y.6, i64 0
  %y_lanes.5 = shufflevector <16 x float> %y_lane.5, <16 x float> poison, <16 x i32> zeroinitializer
  %sum5.0 = call <16 x float> @llvm.fma.v16f32(<16 x float> %y_lanes.5, <16 x float> %weight, <16 x float> %sum5.0.n)
  %n.next = add i64 %n, 1
  br label %n.head
n.done:
  store <16 x float> %sum0.0.n, ptr %parts_at, align 64
  %part_at = getelementptr <16 x float>, ptr %parts_at, i64 1
  store <16 x float> %sum1.0.n, ptr %part_at, align 64
  %part_at.1 = getelementptr <16 x float>, ptr %parts_at, i64 2
  store <16 x float> %sum2.0.n, ptr %part_at.1, align 64
  %part_at.2 = getelementptr <16 x float>, ptr %parts_at, i64 3
  store <16 x float> %sum3.0.n, ptr %part_at.2, align 64
  %part_at.3 = getelementptr <16 x float>, ptr %parts_at, i64 4
  store <16 x float> %sum4.0.n, ptr %part_at.3, align 64
  %part_at.4 = getelementptr <16 x float>, ptr %parts_at, i64 5
  store <16 x float> %sum5.0.n, ptr %part_at.4, align 64
  %tile_row.next = add i64 %tile_row, 6
  br label %tile_row.head
tile_row.done:
  ret void
}

; %rows of y times 16 · %count rows of Q6_K from 16 · %chunk on; N = 2000.
; 125 panels of 3360 bytes; rows of y are 2000 floats apart.
define internal void @q6_k_t_k256_n2000_rows6_chunks5(ptr noalias %y, ptr noalias %w, ptr noalias %tile, i64 %chunk, i64 %count, i64 %rows) #0 {
entry:
  %parts = alloca [192 x <16 x float>], align 64
  br label %stretch.head
stretch.head:
  %stretch = phi i64 [ 0, %entry ], [ %stretch.next, %c.done ]
  %stretch.more = icmp slt i64 %stretch, 125
  br i1 %stretch.more, label %stretch.body, label %stretch.done
stretch.body:
  %beyond = add i64 %stretch, 8
  %is_first = icmp eq i64 %stretch, 0
  %stretch_end = call i64 @llvm.smin.i64(i64 %beyond, i64 125)
  br label %c.head
c.head:
  %c = phi i64 [ 0, %stretch.body ], [ %c.next, %row.done ]
  %c.more = icmp slt i64 %c, %count
  br i1 %c.more, label %c.body, label %c.done
c.body:
  %number = add i64 %chunk, %c
  call void @q6_k_t_k256_n2000_rows6_chunks5_stretch(ptr %y, ptr %w, ptr %parts, i64 %stretch, i64 %stretch_end, i64 %number, i64 %rows)
  br label %row.head
row.head:
  %row = phi i64 [ 0, %c.body ], [ %row.next, %row.body ]
  %row.more = icmp slt i64 %row, %rows
  br i1 %row.more, label %row.body, label %row.done
row.body:
  %part_at = getelementptr <16 x float>, ptr %parts, i64 %row
  %part = load <16 x float>, ptr %part_at, align 64
  %position = mul i64 %row, 5
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
  %stretch.next = add i64 %stretch, 8
  br label %stretch.head
stretch.done:
  ; each sum moves to the front, behind those that have moved
  %used = mul i64 %rows, 5
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

; 64 of 195 columns for rows %first … %end: 1 product and the epilogue.
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
  %tile = alloca [960 x [2 x <16 x float>]], align 64
  ; fewer rows than a tile are multiplied again together with those before them
  %last = sub i64 %end, 6
  %first_row = call i64 @llvm.smin.i64(i64 %first, i64 %last)
  %rows = sub i64 %end, %first_row
  %x_offset = mul i64 %first_row, 2000
  %x_at = getelementptr float, ptr %prologue, i64 %x_offset
  %first_panel = mul i64 %task, 4
  %left = sub i64 13, %first_panel
  %panel_count = call i64 @llvm.smin.i64(i64 %left, i64 4)
  %chunk = mul i64 %task, 4
  %left.1 = sub i64 16, %chunk
  %more = add i64 %panel_count, 1
  %chunk_count = call i64 @llvm.smin.i64(i64 %more, i64 %left.1)
  call void @q6_k_t_k256_n2000_rows6_chunks5(ptr %x_at, ptr %w, ptr %tile, i64 %chunk, i64 %chunk_count, i64 %rows)
  %first_panel.1 = mul i64 %task, 4
  %left.2 = sub i64 13, %first_panel.1
  %panel_count.1 = call i64 @llvm.smin.i64(i64 %left.2, i64 4)
  br label %panel.head
panel.head:
  %panel = phi i64 [ 0, %entry ], [ %panel.next, %r.done ]
  %panel.more = icmp slt i64 %panel, %panel_count.1
  br i1 %panel.more, label %panel.body, label %panel.done
panel.body:
  br label %r.head
r.head:
  %r = phi i64 [ 0, %panel.body ], [ %r.next, %r.body ]
  %r.more = icmp slt i64 %r, %rows
  br i1 %r.more, label %r.body, label %r.done
r.body:
  %row = add i64 %first_row, %r
  %column = mul i64 %task, 64
  %column.1 = mul i64 %panel, 16
  %column.2 = add i64 %column, %column.1
  %start = mul i64 %r, 80
  %start.1 = mul i64 %panel, 16
  %start.2 = add i64 %start, %start.1
  %position = add i64 %start.2, 5
  %sums_at = getelementptr float, ptr %tile, i64 %position
  %sums = load <16 x float>, ptr %sums_at, align 4
  %left.3 = sub i64 195, %column.2
  %more.1 = icmp sgt i64 %left.3, 16
  %few = select i1 %more.1, i64 16, i64 %left.3
  %count = trunc i64 %few to i32
  %count_lane = insertelement <16 x i32> poison, i32 %count, i64 0
  %count_lanes = shufflevector <16 x i32> %count_lane, <16 x i32> poison, <16 x i32> zeroinitializer
  %mask = icmp slt <16 x i32> <i32 0, i32 1, i32 2, i32 3, i32 4, i32 5, i32 6, i32 7, i32 8, i32 9, i32 10, i32 11, i32 12, i32 13, i32 14, i32 15>, %count_lanes
  %row_factor_at = getelementptr float, ptr %row_factors, i64 %row
  %row_factor = load float, ptr %row_factor_at, align 4
  %row_factor_lane = insertelement <16 x float> poison, float %row_factor, i64 0
  %row_factor_lanes = shufflevector <16 x float> %row_factor_lane, <16 x float> poison, <16 x i32> zeroinitializer
  %product = fmul <16 x float> %sums, %row_factor_lanes
  %output0_offset = mul i64 %row, 195
  %output0_row_at = getelementptr float, ptr %output0, i64 %output0_offset
  %output0_at = getelementptr float, ptr %output0_row_at, i64 %column.2
  call void @llvm.masked.store.v16f32.p0(<16 x float> %product, ptr %output0_at, i32 4, <16 x i1> %mask)
  %r.next = add i64 %r, 1
  br label %r.head
r.done:
  %panel.next = add i64 %panel, 1
  br label %panel.head
panel.done:
  ret void
}

; Tasks are numbered through all sections, and again for each band of 192 rows of x.
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
  %band = udiv i64 %number, 4
  %task = urem i64 %number, 4
  %first = mul i64 %band, 192
  %beyond = add i64 %first, 192
  %end = call i64 @llvm.smin.i64(i64 %m, i64 %beyond)
  %below = icmp slt i64 %task, 4
  br i1 %below, label %section0, label %after0
section0:
  call void @q4jit_product.section0(ptr %args, i64 %task, i64 %first, i64 %end)
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
  %rounded_up = add i64 %m, 191
  %bands = udiv i64 %rounded_up, 192
  %task_count = mul i64 %bands, 4
  call void @parallel_for(ptr %pool, ptr @q4jit_product.columns, ptr %args, i64 %task_count, i64 1)
  ret void
}

declare <16 x float> @llvm.fabs.v16f32(<16 x float>)
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
declare float @llvm.vector.reduce.fmax.v16f32(<16 x float>)
declare i32 @llvm.smax.i32(i32, i32)
declare i32 @llvm.smin.i32(i32, i32)
declare i64 @llvm.smin.i64(i64, i64)
declare void @llvm.masked.store.v16f32.p0(<16 x float>, ptr, i32, <16 x i1>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)

attributes #0 = { nounwind "prefer-vector-width"="256" "min-legal-vector-width"="256" }
attributes #1 = { alwaysinline nounwind }

!0 = distinct !{!0, !{!"llvm.loop.unroll.full"}}
