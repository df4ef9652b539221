from ssmzoo._torchvision import make_importable

make_importable()  # before Lightning or timm is imported anywhere below
