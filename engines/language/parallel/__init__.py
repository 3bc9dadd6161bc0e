"""One language model over several processes of one machine, each with its share of every layer: tensor parallelism.

    rank 0     HTTP ▸ scheduler ▸ runner ▸ sampler      the engine as it is with one rank
    rank 1…                       runner                told each step by rank 0, and nothing else

`group` adds up what the ranks computed, `sharding` cuts the model, `steps` brings a step to every rank and `carrier`
makes one transfer of theirs; `ranks` is rank 0's hold on the others and `rank` what these do.
"""
