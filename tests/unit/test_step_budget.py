"""A server's step budget, by what computes."""

from deploy.settings import CPU_STEP_TOKENS, Settings, with_step_budget


def test_a_cpu_takes_smaller_steps() -> None:
    for options, num_gpus, expected in (
        ({}, 0, CPU_STEP_TOKENS),
        ({"max_num_seqs": 900}, 0, 900),
        ({"device": "cpu"}, 4, CPU_STEP_TOKENS),
        ({}, 4, 2048),
        ({"max_num_batched_tokens": 700}, 0, 700),
        ({"enable_chunked_prefill": False}, 0, 2048),
    ):
        settings = Settings.from_options(with_step_budget(options, num_gpus))
        assert settings.engine.scheduler.max_num_batched_tokens == expected
