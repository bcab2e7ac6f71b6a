import sys, jax
from benchmarks import tune_causal_conv1d as t
from benchmarks.timing import time_calls
from pallas_kernels.causal_conv1d import mosaic_gpu
from pallas_kernels.causal_conv1d.mosaic_gpu import geometry
def sweep(shape, name, variants, segments=False):
    import numpy as np
    sets = t.make_inputs(shape, max(2, int(300e6 / (4 * np.prod(shape)))), segments)
    f = getattr(t, name)
    for v, T, s, c, u in variants:
        g = geometry.Geometry(v, T, min(s, c), c, u)
        setattr(geometry, name, lambda *_: g)
        try:
            r = time_calls(lambda i, d: f(i, d), sets, samples=7)
            print(shape, name, f"v{v} T{T} s{s} c{c} u{u}", "seg" if segments else "", f"{1e3*r.median:.4f} [{1e3*r.lower:.4f} {1e3*r.upper:.4f}]", flush=True)
        except Exception as e: print(v, T, s, c, u, str(e)[:100])
big = (8, 2048, 5120)
sweep(big, "backward", [(4,4,3,32,4),(4,4,4,32,4),(4,4,4,16,4),(4,4,5,32,4),(4,4,4,32,2),(4,4,4,64,4),(4,8,3,16,4),(4,8,3,16,8),(4,8,3,32,4),(2,8,3,16,4),(2,8,4,16,4),(2,8,4,32,4),(2,16,3,8,4),(2,16,3,16,4),(2,8,4,16,8),(8,4,3,16,4),(8,4,3,32,4),(8,4,3,16,2)])
sweep(big, "forward", [(8,4,4,4,4),(8,4,5,8,4),(4,4,4,8,4),(4,4,5,16,4),(4,8,3,4,4),(4,8,4,4,4),(4,8,3,8,4),(2,16,3,4,4),(2,8,4,8,4)])
small = (1, 2048, 1536)
sweep(small, "backward", [(4,4,4,4,4),(4,4,4,8,4),(4,8,2,2,4),(2,8,2,2,4),(2,8,4,4,4),(4,4,2,2,4)])
