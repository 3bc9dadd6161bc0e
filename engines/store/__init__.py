"""The embedding store: what one encoder computed, for every other engine of the same model, over Mooncake Store.

A hint and nothing more: whatever it loses, delays or gets wrong, somebody computes again.

    engine ─ EmbeddingStore ─ Link ═ pipes and a slab of shared memory ═ client (a process) ─ Mooncake
"""
