# SPDX-License-Identifier: Apache-2.0
"""One kernel for all optimizer rules, which are in ``rules.py``.

It reads step counts, learning rate, loss scale and the non-finite flag on the device.
"""

import triton
import triton.language as tl

from .._common import (
    bfloat16_bits_stochastic,
    double,
    gradient_factor,
    is_last_program,
    learning_rate,
    load,
    load_scalar,
    random_halves,
    random_halves_anywhere,
    square,
    store,
    sum_partials,
    tile_pointers,
)
from .._table import ID, INDEX, IS_ALIGNED, NUMEL, OFFSET, PARAM, SCALE, STEP, WIDTH


@triton.jit
def run_tile(
    addresses,
    start,
    end,
    c,
    factor,
    seed,
    low,
    high,
    offset,
    squares0,
    squares1,
    FUNCTION: tl.constexpr,
    IS_NORM_PASS: tl.constexpr,
    STORAGES: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Applies a rule to elements [start, start + BLOCK): a full tile as aligned vectors, any other with a mask.

    Returns ``squares0`` and ``squares1`` [BLOCK] with the squares of a norm pass added.
    """
    # Load a tile [BLOCK] of each tensor that this pass reads: parameter, gradient, states. The others count as 0.
    mask = None if FULL else start + tl.arange(0, BLOCK) < end
    pointers = ()
    values = ()
    for k in tl.static_range(len(STORAGES)):
        pointers = pointers + (tile_pointers(addresses[k], start, tl.constexpr(STORAGES[k]), FULL, BLOCK),)
        if READS[k]:
            values = values + (load(pointers[k], mask, tl.constexpr(STORAGES[k])),)
        else:
            values = values + (0.0,)

    # Apply the rule in float32. A norm pass adds up the squares of the two vectors whose norms the rule needs.
    p = values[0]
    g = values[1] * factor
    if IS_NORM_PASS:
        term0, term1, s = FUNCTION(c, p, g, values[2:])
        squares0 += square(term0, mask)
        squares1 += square(term1, mask)
    else:
        p, s = FUNCTION(c, p, g, values[2:])

    # Store what this pass writes, in each tensor's own type. Only a bfloat16 parameter is rounded stochastically.
    values = (p, g) + s
    for k in tl.static_range(len(STORAGES)):
        if WRITES[k]:
            if k == 0 and STOCHASTIC:
                if offset % 8 == 0:
                    random = random_halves(seed, low, high, offset + start, BLOCK)
                else:
                    random = random_halves_anywhere(seed, low, high, offset + start, BLOCK)
                tl.store(pointers[0], bfloat16_bits_stochastic(p, random), mask=mask)
            else:
                store(pointers[k], values[k], mask, tl.constexpr(STORAGES[k]))
    return squares0, squares1


HYPER_SLOTS = 8
SCALARS = [f"h{k}" for k in range(HYPER_SLOTS)] + ["lr", "direction", "a_lr", "a_grad_scale", "a_found_inf", "seed"]
POINTERS = ["p_records", "p_chunks", "p_tickets", "p_norms", "p_partials"]


@triton.jit(do_not_specialize=POINTERS + SCALARS)
def step_kernel(
    p_records,
    p_chunks,
    p_tickets,
    p_norms,
    p_partials,
    h0: tl.float64,
    h1: tl.float64,
    h2: tl.float64,
    h3: tl.float64,
    h4: tl.float64,
    h5: tl.float64,
    h6: tl.float64,
    h7: tl.float64,
    lr: tl.float64,
    direction: tl.float64,
    a_lr: tl.int64,
    a_grad_scale: tl.int64,
    a_found_inf: tl.int64,
    seed: tl.int64,
    COEFFICIENTS: tl.constexpr,
    APPLY_NORMS: tl.constexpr,
    FUNCTION: tl.constexpr,
    IS_NORM_PASS: tl.constexpr,
    FLAGS: tl.constexpr,
    HYPERS: tl.constexpr,
    STORAGES: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    COUNTS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over all tensors of a table. Each program takes one chunk of one tensor.

    ``h*`` are the rule's hyperparameters, ``direction`` is -1 to maximise, and ``a_*`` are addresses of float32
    scalars, or null. FUNCTION is the rule's norm_terms or update.
    """
    # A step with non-finite gradients changes nothing, step counts included.
    if load_scalar(a_found_inf.to(tl.int64), 0.0) != 0.0:
        if IS_NORM_PASS:  # whoever adds up shards reads them all the same
            skipped = tl.load(p_chunks + tl.program_id(0))
            if skipped & 0xFFFFFFFF == 0:
                p_norm = p_norms + tl.load(p_records + (skipped >> 32) * WIDTH + INDEX) * 2
                tl.store(p_norm, double(0.0))
                tl.store(p_norm + 1, double(0.0))
        return

    # Find the tensor and the chunk of the program.
    i_program = tl.program_id(0)
    if APPLY_NORMS is not None and not IS_NORM_PASS:
        # The update goes backwards, so that it starts with what the norm pass has left in the cache.
        i_program = tl.num_programs(0) - 1 - i_program
    chunk = tl.load(p_chunks + i_program)
    i_tensor = chunk >> 32
    i_chunk = chunk & 0xFFFFFFFF
    p_record = p_records + i_tensor * WIDTH
    numel = tl.load(p_record + NUMEL)
    addresses = ()
    for k in tl.static_range(len(STORAGES)):
        addresses = addresses + (tl.load(p_record + PARAM + k),)

    # Compute the rule's coefficients in float64 and round them to float32 scalars. `finished` counts earlier steps.
    # Every program repeats this, which costs little next to a chunk.
    finished = double(0.0)
    if COUNTS:
        p_step = tl.load(p_record + STEP).to(tl.pointer_type(tl.float32))
        finished = tl.load(p_step).to(tl.float64)
    h = [tl.full((), x, tl.float64) for x in (h0, h1, h2, h3, h4, h5, h6, h7)][:HYPERS]
    rate = learning_rate(lr, a_lr)
    c = COEFFICIENTS(h, rate, finished + 1.0, load_scalar(tl.load(p_record + SCALE), 1.0), FLAGS)
    if APPLY_NORMS is not None and not IS_NORM_PASS:
        # The norm pass has left the two squared norms of the tensor.
        p_norm = p_norms + tl.load(p_record + INDEX) * 2
        c = APPLY_NORMS(h, c, (tl.load(p_norm), tl.load(p_norm + 1)), FLAGS)
    factor = gradient_factor(direction, a_grad_scale)

    # The random bits of an element depend on seed, tensor id, step and its place in the whole tensor alone.
    low = tl.load(p_record + ID)
    offset = tl.load(p_record + OFFSET)
    high = finished.to(tl.int64)
    # Tile by tile over the elements [begin, end) of the chunk: full tiles up to full_end as aligned vectors; the rest,
    # or everything in a tensor that is not aligned, with a mask.
    begin = i_chunk * CHUNK
    end = tl.minimum(begin + CHUNK, numel)
    full_end = begin
    if tl.load(p_record + IS_ALIGNED) != 0:
        full_end = end - (end - begin) % BLOCK
    squares0 = tl.zeros((BLOCK,), tl.float64)
    squares1 = tl.zeros((BLOCK,), tl.float64)
    # fmt: off
    for start in range(begin, full_end, BLOCK):
        squares0, squares1 = run_tile(
            addresses, start, end, c, factor, seed, low, high, offset, squares0, squares1,
            FUNCTION, IS_NORM_PASS, STORAGES, READS, WRITES, STOCHASTIC, True, BLOCK)
    for start in range(full_end, end, BLOCK):
        squares0, squares1 = run_tile(
            addresses, start, end, c, factor, seed, low, high, offset, squares0, squares1,
            FUNCTION, IS_NORM_PASS, STORAGES, READS, WRITES, STOCHASTIC, False, BLOCK)
    # fmt: on

    # The last program of a tensor finishes it: after a norm pass it adds the partial sums [chunks, 2] of all programs,
    # after an update it counts the step, when no program needs the old count any more.
    count = tl.maximum(tl.cdiv(numel, CHUNK), 1)
    if IS_NORM_PASS:
        # Chunks of a tensor are neighbours in the table, so that its partial sums are contiguous.
        p_partial = p_partials + i_program.to(tl.int64) * 2
        tl.store(p_partial, tl.sum(squares0))
        tl.store(p_partial + 1, tl.sum(squares1))
        if is_last_program(p_tickets + i_tensor, count):
            p_first = p_partial - i_chunk * 2
            p_norm = p_norms + tl.load(p_record + INDEX) * 2
            tl.store(p_norm, sum_partials(p_first, count, BLOCK))
            tl.store(p_norm + 1, sum_partials(p_first + 1, count, BLOCK))
    elif COUNTS:
        if is_last_program(p_tickets + i_tensor, count):
            tl.store(p_step, (finished + 1.0).to(tl.float32))
