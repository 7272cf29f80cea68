"""What a server is told where nothing is given, by what computes."""

from deploy.settings import CPU_STEP_TOKENS, Settings, with_server_defaults


def test_a_cpu_takes_smaller_steps() -> None:
    for options, num_gpus, expected in (
        ({}, 0, CPU_STEP_TOKENS),
        ({"max_num_seqs": 900}, 0, 900),
        ({"device": "cpu"}, 4, CPU_STEP_TOKENS),
        ({}, 4, 8192),
        ({"max_num_seqs": 9000}, 4, 9000),
        ({"max_num_batched_tokens": 700}, 4, 700),
        ({"max_num_batched_tokens": 700}, 0, 700),
        ({"enable_chunked_prefill": False}, 0, 2048),
    ):
        settings = Settings.from_options(with_server_defaults(options, num_gpus))
        assert settings.engine.scheduler.max_num_batched_tokens == expected


def test_a_cpu_takes_the_memory_of_its_blocks_at_the_start() -> None:
    for options, num_gpus, expected in (
        ({}, 0, True),
        ({"device": "cpu"}, 4, True),
        ({}, 4, False),
        ({"prefault_kv_cache": False}, 0, False),
        ({"num_replicas": 2}, 0, False),
        ({"enable_chunked_prefill": False}, 0, True),
    ):
        settings = Settings.from_options(with_server_defaults(options, num_gpus))
        assert settings.engine.cache.prefault_kv_cache is expected
