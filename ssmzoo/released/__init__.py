"""Released checkpoints into our modules and back: one file per family, found by its name.

    released/<family>.py
        official(state, **official_kwargs) -> (module, our_state)
            `state` maps official keys to tensors, `official_kwargs` are the official class's constructor arguments;
            `module` takes the official inputs in order and returns the official outputs, `our_state` is `state` under
            our names. The key map is made of differentiable tensor operations (rename, split, transpose, stack), so
            that gradients with respect to the official tensors can be read off as well.
        from_official(model, state) -> our_state      for a model of ours that exists already (image models)
        to_official(module, state) -> state           the way back; without it our names are theirs
        golden(case) -> {output name: tensor}         when a golden case is more than one call of the module
        TELLING_KEYS                                  a pattern of keys that only the checkpoints of this family have
        YIELDS_TO                                     (and those of the families named here)

Here a family's golden cases are answered, too: see golden.py.
"""
