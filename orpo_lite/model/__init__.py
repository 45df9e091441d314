"""Build, load, check and run the model in memory.

Import order: optimizer, score_head, pair_model, quantize, adapter, sharding, generate, memory,
parallel, load_sharded, held_out, ppo_adapters, probe_values, probe_gradients, probe, load.
"""
