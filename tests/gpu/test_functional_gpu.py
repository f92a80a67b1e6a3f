"""CPU tests of the public functions, run unchanged on a GPU.

Those with the fixture `rows` have a CUDA case of their own (conftest.CUDA).
"""

import pytest
import torch
from test_gradients import (  # noqa: F401
    test_backward_twice,
    test_no_token_and_no_mass,
    test_one_flat_chunk_costs_the_others_little,
    test_statistics_with_a_gradient_in_every_word_are_dense,
    test_tied_weight,
)
from test_ops import (  # noqa: F401
    test_opcheck,
    test_opcheck_of_logits,
    test_second_derivatives_are_refused,
)
from test_peers import (  # noqa: F401
    test_entropy_bonus_is_not_dropped,
    test_gradients_of_near_uniform_rows,
    test_no_nan_reaches_tokens_that_were_left_out,
)
from test_precision import test_entropy_loss, test_token_stats  # noqa: F401
from test_sink import test_frozen_weight_and_bias, test_no_token  # noqa: F401
from test_token_loss import (  # noqa: F401
    test_16_bit_losses_are_summed_in_fp32,
    test_a_function_that_keeps_a_variable,
    test_backward_twice_and_not_again_of_itself,
    test_chunks_with_nothing_to_score,
    test_leading_dimensions_count_flat,
    test_mask_weighs_and_leaves_out,
    test_no_tokens,
    test_what_loss_fn_does_to_its_arguments_stays_there,
    test_without_targets_there_is_no_logprob,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.usefixtures("on_cuda"),
]
