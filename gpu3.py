import sys, time
from benchmarks import tune_selective_scan as tune
from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry
from pallas_kernels.selective_scan.mosaic_gpu.plan import Plan
def G(parts=1, **k): return Plan(Geometry(16, **k), parts)
def T(parts=1, tc=2, **k): return Plan(Geometry(16, tensor_cores=True, lane_channels=tc, **({"tiles":1}|k)), parts)
deadline = time.monotonic() + float(sys.argv[1])
F = {
 "large": [G(tiles=2,unroll=4,warpgroups=5,stagger=s) for s in (0,400,800,1200,1600,2400)] + [G(tiles=2,unroll=4,warpgroups=5,stagger=1600,shared_stages=8), G(tiles=2,unroll=2,warpgroups=5,stagger=1600), G(tiles=2,unroll=4,warpgroups=5,stagger=1600,shared_stages=2), T(unroll=4,warpgroups=5,stagger=1500), T(unroll=2,warpgroups=5,stagger=1500)],
 "medium": [G(tiles=1,unroll=4,steps=32,warpgroups=3,stagger=s) for s in (0,1000,2000,3000)]+ [G(tiles=1,unroll=4,steps=16,warpgroups=3,stagger=s) for s in (500,1000,2000)],
}
for name, plans in F.items():
    tune.tune(f"forward {name}", tune.SHAPES[name], iter(plans), tune._run_forward, deadline)
