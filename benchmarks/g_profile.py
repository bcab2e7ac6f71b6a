import sys, glob, tempfile, collections, jax
from benchmarks import tune_causal_conv1d as t
from pallas_kernels.causal_conv1d.mosaic_gpu import geometry
for shape in [(8, 2048, 5120), (1, 2048, 1536)]:
    sets = t.make_inputs(shape, 4, False)
    for name, f in (("forward", t.forward), ("backward", t.backward)):
        p = jax.jit(lambda s, f=f: [f(*i) for i in s])
        jax.block_until_ready(p(sets))
        d = tempfile.mkdtemp()
        with jax.profiler.trace(d):
            for _ in range(5): out = p(sets)
            jax.block_until_ready(out)
        data = jax.profiler.ProfileData.from_file(glob.glob(d + "/**/*.xplane.pb", recursive=True)[0])
        times = collections.defaultdict(list)
        for plane in data.planes:
            if "GPU" in plane.name:
                for line in plane.lines:
                    for e in line.events:
                        times[line.name[:30] + " " + e.name[:50]].append(e.duration_ns / 1e3)
        print(shape, name)
        for k, v in sorted(times.items()):
            v.sort(); print("   ", k, len(v), "median us", round(v[len(v) // 2], 2), "min", round(v[0], 2))
