"""Triton kernels and their launchers: one file per pass over the large tensors.

    language           what kernels share: exact dots, rounding, dropout, the expert of a row
    launch             launch constants, the one place that launches, recording instead of launching
    dropout            arguments of kernels that drop inputs

    dense: every expert of every token, as one update of rank R
    shrink_route       h = a x, gate = softmax(router x): one pass over x
    expand             y += u bᵀ in place, and the gate sums
    up_gradients       du and db: one pass over dy
    rank_gradients     dh and dlogits, in rank space
    down_gradients     da and drouter: one pass over x
    input_gradient     dx += dh a + dlogits router in place; the second stage of the reductions

    dense, other ways to the product with the frozen weight
    base_product       which way is taken, by measurement
    extended_gemm      one persistent GEMM whose K is longer by R; persistent: what it is made of
    decode             the whole layer in two launches, up to 64 tokens

    grouped: each token meets the experts that it keeps
    top_k_route        gates and choices; sort_slots: (token, expert) pairs sorted by expert
    grouped_tiles      which slots a program owns, found on the device
    grouped_shrink, grouped_expand, grouped_rank_gradients, grouped_parameter_gradients,
    grouped_input_gradient, top_k_route_backward        the passes above, expert by expert
    gate_sums          sums of gates per segment, alone

    importance scores
    row_dots           of activations: one pass over two of them
    parameter_scores   of W ⊙ gᵀx, tile by tile; score_sums: the second stage of both

Imported when an op first runs on the backend "triton", never by `import citi_kernels`. Kernels
run on a GPU; with TRITON_INTERPRET=1 on the CPU, element by element, to test values.
"""
