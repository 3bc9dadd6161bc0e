"""Our transports inside vLLM: an encoder-cache connector that vLLM loads by module path. Nothing here starts a server.

    --ec-transfer-config '{"ec_role": "ec_consumer", "ec_connector": "TriptychECConnector",
        "ec_connector_module_path": "engines.ec_connector.vllm",
        "ec_connector_extra_config": {"transfer": "storage", "shared_storage_path": "/mnt/embeddings"}}'

    scheduler process                                            worker processes
    SchedulerSide ── Arrivals: who waits for what                WorkerSide: shelf → encoder cache,
              └───── Courier: a thread that fetches, publishes   encoder cache → shelf
                        │ writes                        reads │
                        ▼                                     ▼
                    the shelf: <folder>/<mm_hash>/encoder_cache.safetensors, on this machine

Only `vllm` imports vLLM. Workers must see the scheduler's shelf, that is, run on its machine.
"""
