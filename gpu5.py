import sys, time
from benchmarks import tune_selective_scan as tune
from pallas_kernels.selective_scan.mosaic_gpu import plan
from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry
from pallas_kernels.selective_scan.mosaic_gpu.plan import Plan
def G(parts=1, **k): return Plan(Geometry(16, **({"tiles":2}|k)), parts)
deadline = time.monotonic() + float(sys.argv[1])
P = lambda name: plan.forward(*tune.SHAPES[name][:3], 1, 16, 2)
Q = lambda name: plan.backward(*tune.SHAPES[name][:3], 1, 16, 2)
F = {"large": [P("large")], "medium": [P("medium")], "small": [P("small"), G(16,unroll=4,warpgroups=3)], "long": [P("long"), G(22,unroll=4,warpgroups=4), G(22,unroll=4,warpgroups=4,shared_stages=2), G(55,unroll=4), G(33,unroll=4,warpgroups=3)]}
B = {"large": [Q("large")], "medium": [Q("medium"), G(1), G(4)], "small": [Q("small"), G(32)], "long": [Q("long"), G(16)]}
for which, table, run in (("backward", B, tune._run_backward), ("forward", F, tune._run_forward)):
    for name, plans in table.items():
        tune.tune(f"{which} {name}", tune.SHAPES[name], iter(plans), run, deadline)
