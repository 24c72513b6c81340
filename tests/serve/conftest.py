# SPDX-License-Identifier: Apache-2.0
"""The stock run that several test files compare with: greedy tokens do not depend on how many ranks computed them."""

from __future__ import annotations

import random

import pytest
from demo import Cluster
from launched_ranks import Baseline, Prompt, one_at_a_time, read_ranks, server
from toy_model import ToyModelShape, write_toy_model

# Prompt length and tokens to generate. The first needs two steps of prefill, both too large for MC2; the second one is
# no larger than a decode batch, so that a prefill through MC2 is among them.
REQUESTS = ((90, 12), (5, 24), (40, 9))


@pytest.fixture(scope="session")
def baseline(tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    folder = tmp_path_factory.mktemp("baseline")
    shape = ToyModelShape()
    model = write_toy_model(folder / "model", shape)
    draw = random.Random(11)
    prompts: list[Prompt] = [
        ([draw.randrange(3, shape.vocab_size) for _ in range(length)], count) for length, count in REQUESTS
    ]
    node = server(folder / "stock", model, ["--data-parallel-size", "2", "--api-server-count", "1"], overlay=False)
    with Cluster() as cluster:
        cluster.start(node.process)
        cluster.wait_until_ready({node.process: f"{node.url}/health"})
        tokens = one_at_a_time(node, prompts)
        cluster.check()
    return Baseline(model, prompts, tokens, read_ranks([node]), node.log)
