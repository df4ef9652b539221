from ssmzoo._torchmetrics import import_lightly
from ssmzoo._torchvision import cure_on_import

import_lightly()  # before Lightning is imported anywhere below
cure_on_import()  # before timm is
