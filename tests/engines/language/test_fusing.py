from __future__ import annotations

import pytest
import torch

from engines.language.fusing import FusedNorm, fuse
from engines.language.model import LanguageModel
from engines.language.runner import Runner
from tests.support.checkpoints import FAMILIES, checkpoint
from tests.support.drive import Driver, case, language_model, new_cache

NORMS_PER_LAYER = {"qwen3_vl": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_generate(family: str) -> None:
    model = LanguageModel.load(checkpoint(family))
    names = list(model.state_dict())
    assert fuse(model) == NORMS_PER_LAYER.get(family, 2) * model.facts.num_layers + 1
    assert list(model.state_dict()) == names
    assert fuse(model) == 0
    cases = [case(family, name) for name in ("one", "text")]
    loop = Driver(Runner(model, new_cache(model)), chunk=24)
    assert loop.finish(*(loop.of(one) for one in cases)) == [one.expected for one in cases]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_it_computes_what_the_written_out_one_does(dtype: torch.dtype, close: float) -> None:
    norm = language_model("qwen3_vl").model.norm
    weight = torch.nn.Parameter(torch.randn(256, generator=torch.Generator().manual_seed(0)).to(dtype))
    hidden = torch.randn(9, 256, generator=torch.Generator().manual_seed(1)).to(dtype) * 30
    theirs = type(norm)(256, eps=1e-5)
    theirs.weight = weight
    found = FusedNorm(weight, 1e-5)(hidden)
    assert found.dtype == dtype
    torch.testing.assert_close(found, theirs(hidden), rtol=close, atol=close)
