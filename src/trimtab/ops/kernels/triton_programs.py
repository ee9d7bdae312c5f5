"""The programs that ``trimtab.ops.kernels.triton`` starts on a GPU. Importing this file imports triton.

The factors of a thin update may lie in any way (strides of rows and columns), all else lies together. The programs
compute in ``ACC`` (float32; float64 for float64), and give their dots numbers of type ``DOT``. Rows are counted in 64
bits, since tokens times features exceeds 2^31. Nothing is added up by atomics: what many programs add to goes into one
place of scratch memory for each, and ``add_up`` adds those up in a fixed order, so that a step repeats bit for bit.
"""

# Triton reads the signatures itself, so they say no more than which arguments are known when a program is compiled.
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator, no-untyped-call"

import triton
import triton.language as tl


@triton.jit
def _loaded(block, in_rows, in_columns):
    """What lies at a ``block`` of addresses, 0 where it is outside of the matrix."""
    return tl.load(block, mask=in_rows[:, None] & in_columns[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def forward_pass(
    product,
    output,
    inner,
    b,
    ratio,
    bias,
    tokens,
    out,
    rank,
    inner_row,
    inner_column,
    b_row,
    b_column,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    THIN: tl.constexpr,
    SPREAD: tl.constexpr,
    RATIO: tl.constexpr,
    BY_ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``output = c (p + s h B^T) + bias``; with KEEP the sum before the ratio goes back to ``product``, with BY_ROWS
    there is a ratio for each row. With SPREAD ``inner`` is added itself, ``rank`` numbers a row, repeated until the row
    is full. A program has BM rows and BN columns."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    in_rows, in_columns = rows < tokens, columns < out
    mask = in_rows[:, None] & in_columns[None, :]
    rows = rows.to(tl.int64)
    place = rows[:, None] * out + columns[None, :]
    total = tl.load(product + place, mask=mask, other=0.0).to(ACC)
    if THIN:
        ranks = tl.arange(0, BR)
        in_ranks = ranks < rank
        h = _loaded(inner + rows[:, None] * inner_row + ranks[None, :] * inner_column, in_rows, in_ranks)
        factor = _loaded(b + ranks[:, None] * b_column + columns[None, :] * b_row, in_ranks, in_columns)
        total += tl.dot(h.to(DOT), factor.to(DOT), input_precision=PRECISION, out_dtype=ACC) * SCALE
    if SPREAD:
        from_inner = inner + rows[:, None] * inner_row + (columns % rank)[None, :] * inner_column
        total += tl.load(from_inner, mask=mask, other=0.0).to(ACC)
    if KEEP:
        tl.store(product + place, total.to(product.dtype.element_ty), mask=mask)
    if RATIO and BY_ROWS:
        total *= tl.load(ratio + rows, mask=in_rows, other=0.0).to(ACC)[:, None]
    elif RATIO:
        total *= tl.load(ratio + columns, mask=in_columns, other=0.0).to(ACC)[None, :]
    if BIAS:
        total += tl.load(bias + columns, mask=in_columns, other=0.0).to(ACC)[None, :]
    tl.store(output + place, total.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def backward_pass(
    grad,
    witness,
    inner,
    b,
    ratio,
    scaled,
    sums,
    witnessed,
    parts_b,
    parts_inner,
    tokens,
    out,
    rank,
    inner_row,
    inner_column,
    b_row,
    b_column,
    SCALE: tl.constexpr,
    STEPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    THIN: tl.constexpr,
    RATIO: tl.constexpr,
    SUMS: tl.constexpr,
    WITNESS: tl.constexpr,
    SCALED: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One walk over ``dy`` and ``y``: BN columns and STEPS times BM rows a program. ``scaled = c dy``; of the sums over
    rows (``sum dy``, ``sum dy y``, ``s (c dy)^T h``) and over columns (``(c dy) s B``) what this program adds, in
    ``[row blocks, out]``, ``[row blocks, out, rank]`` and ``[column blocks, tokens, rank]``."""
    column_block, row_block = tl.program_id(0), tl.program_id(1)
    columns = column_block * BN + tl.arange(0, BN)
    ranks = tl.arange(0, BR)
    in_columns, in_ranks = columns < out, ranks < rank
    total_sums = tl.zeros([BN], ACC)
    total_witnessed = tl.zeros([BN], ACC)
    if RATIO:
        c = tl.load(ratio + columns, mask=in_columns, other=0.0).to(ACC)
    if THIN:
        total_b = tl.zeros([BN, BR], ACC)
        in_b = in_columns[:, None] & in_ranks[None, :]
        factor = _loaded(b + columns[:, None] * b_row + ranks[None, :] * b_column, in_columns, in_ranks).to(DOT)
    for step in range(STEPS):
        rows = (row_block * STEPS + step) * BM + tl.arange(0, BM)
        in_rows = rows < tokens
        mask = in_rows[:, None] & in_columns[None, :]
        rows = rows.to(tl.int64)
        place = rows[:, None] * out + columns[None, :]
        dy = tl.load(grad + place, mask=mask, other=0.0)
        full = dy.to(ACC)
        if SUMS:
            total_sums += tl.sum(full, 0)
        if WITNESS:
            total_witnessed += tl.sum(full * tl.load(witness + place, mask=mask, other=0.0).to(ACC), 0)
        if RATIO:
            dy = (full * c[None, :]).to(dy.dtype)
        if SCALED:
            tl.store(scaled + place, dy, mask=mask)
        if THIN:
            in_h = in_rows[:, None] & in_ranks[None, :]
            h = _loaded(inner + rows[:, None] * inner_row + ranks[None, :] * inner_column, in_rows, in_ranks).to(DOT)
            dy = dy.to(DOT)
            total_b += tl.dot(tl.trans(dy), h, input_precision=PRECISION, out_dtype=ACC)
            dh = tl.dot(dy, factor, input_precision=PRECISION, out_dtype=ACC)
            into = (column_block.to(tl.int64) * tokens + rows[:, None]) * rank + ranks[None, :]
            tl.store(parts_inner + into, dh * SCALE, mask=in_h)
    place = row_block.to(tl.int64) * out + columns
    if SUMS:
        tl.store(sums + place, total_sums, mask=in_columns)
    if WITNESS:
        tl.store(witnessed + place, total_witnessed, mask=in_columns)
    if THIN:
        tl.store(parts_b + place[:, None] * rank + ranks[None, :], total_b * SCALE, mask=in_b)


@triton.jit(do_not_specialize=["count_a", "count_b", "count_c", "count_d"])
def add_up(
    parts_a,
    into_a,
    size_a,
    count_a,
    parts_b,
    into_b,
    size_b,
    count_b,
    parts_c,
    into_c,
    size_c,
    count_c,
    parts_d,
    into_d,
    size_d,
    count_d,
    after_a,
    after_b,
    after_c,
    after_d,
    BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):
    """``into_x [size] = sum of parts_x [count, size]`` for up to four tensors at once, in the order of the parts. The
    programs before ``after_a`` do the first, those up to ``after_b`` the second, and so on."""
    program = tl.program_id(0)
    if program < after_a:
        _add_up(parts_a, into_a, program, size=size_a, count=count_a, BLOCK=BLOCK, ACC=ACC)
    elif program < after_b:
        _add_up(parts_b, into_b, program - after_a, size=size_b, count=count_b, BLOCK=BLOCK, ACC=ACC)
    elif program < after_c:
        _add_up(parts_c, into_c, program - after_b, size=size_c, count=count_c, BLOCK=BLOCK, ACC=ACC)
    else:
        _add_up(parts_d, into_d, program - after_c, size=size_d, count=count_d, BLOCK=BLOCK, ACC=ACC)


@triton.jit
def _add_up(parts, into, block, size, count, BLOCK: tl.constexpr, ACC: tl.constexpr):
    places = block * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    total = tl.zeros([BLOCK], ACC)
    parts += places
    for _ in range(count):
        total += tl.load(parts, mask=mask, other=0.0)
        parts += size
    tl.store(into + places, total.to(into.dtype.element_ty), mask=mask)


@triton.jit
def squared_norms(
    weight,
    squares,
    a,
    b,
    crossed,
    into,
    out,
    features,
    rank,
    weight_row,
    weight_column,
    a_row,
    a_column,
    b_row,
    b_column,
    SCALE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``||W||^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>`` of BM rows, with ``crossed = A A^T``: one walk over W."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    ranks, other_ranks = tl.arange(0, BR), tl.arange(0, BR)
    in_rows, in_ranks = rows < out, ranks < rank
    wide = rows.to(tl.int64)
    product = tl.zeros([BM, BR], ACC)
    for start in range(0, features, BN):
        columns = start + tl.arange(0, BN)
        in_columns = columns < features
        w = _loaded(
            weight + wide[:, None] * weight_row + columns.to(tl.int64)[None, :] * weight_column, in_rows, in_columns
        )
        factor = _loaded(a + columns[:, None] * a_column + ranks[None, :] * a_row, in_columns, in_ranks)
        product += tl.dot(w.to(DOT), factor.to(DOT), input_precision=PRECISION, out_dtype=ACC)
    weights = _loaded(b + rows[:, None] * b_row + ranks[None, :] * b_column, in_rows, in_ranks).to(ACC)
    gram = _loaded(crossed + ranks[:, None] * rank + other_ranks[None, :], in_ranks, other_ranks < rank).to(ACC)
    inner = 2 * SCALE * product + SCALE * SCALE * tl.dot(weights, gram, input_precision="ieee", out_dtype=ACC)
    total = tl.load(squares + rows, mask=in_rows, other=0.0).to(ACC) + tl.sum(weights * inner, 1)
    tl.store(into + rows, tl.maximum(total, 0.0).to(into.dtype.element_ty), mask=in_rows)


@triton.jit
def quotients(magnitude, norm, values, divisor, size, SMALLEST: tl.constexpr, BLOCK: tl.constexpr):
    """``c = m / n``, 0 where n is 0, with m held away from 0; and that m."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    m = tl.load(magnitude + places, mask=mask, other=1.0)
    n = tl.load(norm + places, mask=mask, other=1.0)
    m = tl.where(tl.abs(m) < SMALLEST, tl.where(m < 0, -SMALLEST, SMALLEST), m)
    tl.store(divisor + places, m.to(divisor.dtype.element_ty), mask=mask)
    tl.store(
        values + places, tl.where(n == 0, 0.0, m / tl.where(n == 0, 1.0, n)).to(values.dtype.element_ty), mask=mask
    )
