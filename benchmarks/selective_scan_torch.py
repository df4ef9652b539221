"""The pure-PyTorch scan against mambapy's parallel scan, forward and backward, both in one run.

python benchmarks/selective_scan_torch.py
"""

from ops import Case, measure, report
from ops_selective_scan import D, N, mambapy, ours, training

CASE = Case(
    f"scan forward + backward (1, {D}, 512, {N})",
    {"ssmzoo, torch backend": training(lambda call: ours(call, "torch"), 512), "mambapy": training(mambapy, 512)},
    target=3,
)

if __name__ == "__main__":
    print(report([(CASE, measure(CASE, repeats=9))]))
