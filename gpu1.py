"""First look: variants of the forward and backward kernels."""
import sys, time
from benchmarks import tune_selective_scan as tune
from pallas_kernels.selective_scan.mosaic_gpu import plan
from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry
from pallas_kernels.selective_scan.mosaic_gpu.plan import Plan
def G(parts=1, **k): return Plan(Geometry(16, **k), parts)
deadline = time.monotonic() + float(sys.argv[1])
F = {
 "large": [G(tiles=2,unroll=4), G(tiles=2,unroll=4,warpgroups=5), G(tiles=2,unroll=2,warpgroups=5), G(tiles=2,unroll=4,warpgroups=5,stages=3),
           G(tiles=2,unroll=4,warpgroups=4), G(tiles=2,unroll=4,warpgroups=2), G(tiles=5,unroll=2,warpgroups=2,steps=16), G(tiles=5,unroll=4,warpgroups=2,steps=16), G(tiles=5,unroll=2,warpgroups=2,steps=32), G(tiles=1,unroll=4,warpgroups=10), G(tiles=4,unroll=2,warpgroups=1,steps=32)],
 "medium": [G(tiles=1,unroll=4,steps=32), G(tiles=1,unroll=4,steps=16,warpgroups=3), G(tiles=1,unroll=4,steps=32,warpgroups=3), G(tiles=3,unroll=4,steps=16), G(tiles=3,unroll=4,steps=32), G(tiles=3,unroll=2,steps=32), G(tiles=2,unroll=4,steps=16,warpgroups=2), G(tiles=2,unroll=4,steps=16), G(tiles=2,unroll=4,steps=32),
            G(tiles=2,unroll=4,steps=32,warpgroups=2)],
 "small": [G(16,tiles=2,unroll=4), G(16,tiles=2,unroll=4,warpgroups=2), G(8,tiles=2,unroll=4,warpgroups=3), G(16,tiles=2,unroll=4,warpgroups=3), G(16,tiles=1,unroll=4,warpgroups=3)],
 "long": [G(44,tiles=2,unroll=4), G(22,tiles=2,unroll=4,warpgroups=4), G(16,tiles=2,unroll=4,warpgroups=3), G(27,tiles=2,unroll=4,warpgroups=4), G(11,tiles=2,unroll=4,warpgroups=2), G(33,tiles=2,unroll=4,warpgroups=6)],
}
B = {
 "large": [G(tiles=2), G(tiles=2,warpgroups=2), G(tiles=2,stages=1), G(tiles=2,stages=1,warpgroups=4), G(tiles=5,stages=1), G(tiles=4,stages=1), G(tiles=5,stages=1,unroll=1)],
}
for which, table, variants, run in (("forward", F, None, tune._run_forward), ("backward", B, None, tune._run_backward)):
    if which not in sys.argv[2:]: continue
    for name, plans in table.items():
        tune.tune(f"{which} {name}", tune.SHAPES[name], iter(plans), run, deadline)
