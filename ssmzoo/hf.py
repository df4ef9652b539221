"""`import ssmzoo.hf` registers the zoo's language models with Hugging Face transformers:

>>> import ssmzoo.hf
>>> from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
>>> model = AutoModelForCausalLM.from_pretrained("runs/mamba")     # a run folder, or what `ckpt export --to hf` wrote
>>> tokenizer = AutoTokenizer.from_pretrained("runs/mamba")
>>> pipeline("text-generation", model=model, tokenizer=tokenizer)("def ")

See docs/huggingface.md.
"""

from ssmzoo._torchvision import make_importable

make_importable()  # transformers imports torchvision where it is installed

from ssmzoo.inference.hf import StateCache, ZooConfig, ZooForCausalLM, register  # noqa: E402

register()

__all__ = ["StateCache", "ZooConfig", "ZooForCausalLM"]
