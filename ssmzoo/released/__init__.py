"""Released checkpoints into our modules and back: one file per family, found by its name.

    released/<family>.py
        official(state, **given) -> (module, our_state)
            `state` maps official keys to tensors, `given` are the official class's constructor arguments; `module`
            takes the official inputs in order and returns the official outputs, `our_state` is `state` under our names.
            The key map is made of differentiable tensor operations (rename, split, transpose, stack), so that gradients
            with respect to the official tensors can be read off as well.
        TABLES          the constructors of the official classes (arguments.py): every argument with its default there,
                        honoured, without effect, or refused with the reason
        infer(state, given) -> {argument: value}    what the shapes of the tensors tell
        MODELS          classes of ours whose weights the family's names can hold
        from_official(model, state) -> our_state    for a model that exists already; without it our names are theirs
        to_official(module, state) -> state         the way back; without it our names are theirs
        golden(case) -> {output name: tensor}       when a golden case is more than one call of the module
        TELLING_KEYS    patterns, each of which fits some key of this family's checkpoints and of no other's
        YIELDS_TO       but for those of the families named here
        MODEL_TYPE      what config.json says in transformers' folders
        WRAPPERS        which container of a file holds the published weights, where that is not the usual one
        CATALOGUE       the files that its authors released (catalogue.py): source, licence, arguments, published metric

load.py puts these together; download.py fetches released files and pretrained.py puts them into models; files.py and
unpickle.py read files and run nothing from them; fit.py loads tensors or says what does not fit; golden.py compares
with stored cases; describe.py says what a file is.
"""
