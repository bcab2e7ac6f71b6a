import sys, time
from benchmarks import tune_selective_scan as tune
from pallas_kernels.selective_scan.mosaic_gpu.geometry import Geometry
from pallas_kernels.selective_scan.mosaic_gpu.plan import Plan
def G(parts=1, **k): return Plan(Geometry(16, **({"tiles":2}|k)), parts)
deadline = time.monotonic() + float(sys.argv[1])
F = {
 "large": [G(unroll=4,warpgroups=5), G(unroll=4,warpgroups=5,shared_stages=2), G(unroll=4,warpgroups=5,shared_stages=8), G(unroll=2,warpgroups=5,shared_stages=2),G(unroll=8,warpgroups=5,shared_stages=2), G(unroll=4)],
 "medium": [G(tiles=1,unroll=4,steps=32,warpgroups=3), G(tiles=1,unroll=4,steps=32,warpgroups=3,shared_stages=2),G(tiles=1,unroll=4,steps=16,warpgroups=3,shared_stages=2), G(tiles=1,unroll=8,steps=32,warpgroups=3,shared_stages=2), G(tiles=1,unroll=4,steps=32,warpgroups=6,shared_stages=2), G(tiles=1,unroll=4,steps=32)],
 "small": [G(16,unroll=4), G(16,unroll=4,tiles=1), G(22,unroll=4), G(16,unroll=4,warpgroups=3)],
 "long": [G(44,unroll=4), G(22,unroll=4,warpgroups=4,shared_stages=2), G(33,unroll=4,warpgroups=4), G(55,unroll=4), G(66,unroll=4), G(27,unroll=4,warpgroups=1)],
}
B = {
 "large": [G(), G(stages=1)],
 "medium": [G(2), G(3), G(4), G(1)],
 "small": [G(16), G(24), G(32)],
 "long": [G(32), G(16), G(16,stages=1)],
}
if "ncu" in sys.argv:
    import jax
    s = tune._input_sets(tune.SHAPES["large"])[0]
    for run in (tune._run_forward(F["large"][1]), tune._run_backward(G())):
        f = jax.jit(run); jax.block_until_ready(f(s)); jax.block_until_ready(f(s))
    sys.exit()
for which, table, run in (("backward", B, tune._run_backward), ("forward", F, tune._run_forward)):
    if which not in sys.argv[2:]: continue
    for name, plans in table.items():
        tune.tune(f"{which} {name}", tune.SHAPES[name], iter(plans), run, deadline)
