import sys, pathlib, tempfile, time, torch
sys.path.insert(0, ".")
from tests.parity import paged
from tests.parity.paged import *
from tests.parity.tiny_models import TINY_MODELS
from workers.attention.gather import GatherAttention
torch.backends.cuda.matmul.allow_tf32 = False
d = pathlib.Path(tempfile.mkdtemp()); dev = torch.device("cuda")
seqs = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 40, 17, 70)]
steps = [[(0,0,1),(1,0,13)],[(1,13,1),(2,0,17),(3,0,5)],[(3,5,40),(1,14,20)],[(3,45,1),(1,34,1)],[(1,35,5),(3,46,24)]]
import dataclasses
real = paged.make_batch
def on_gpu(*a):
    b = real(*a)
    return Batch(**{f.name: (v.to(dev) if isinstance(v := getattr(b, f.name), torch.Tensor) else v) for f in dataclasses.fields(b)})
paged.make_batch = on_gpu
paged.CPU = dev
for m in TINY_MODELS:
    if "dynamic" in m.name: continue
    p = m.save(d)
    got = Paged([build(p, backend=GatherAttention)], seqs).logits(steps)
    hf = m.build().to(dev); err = 0.0
    for s, y in zip(seqs, got):
        with torch.no_grad(): err = max(err, (hf(torch.tensor([s], device=dev)).logits[0].cpu() - y).abs().max().item())
    print(f"{m.name:24} {err:.2e}", "" if err < 1e-4 else "BAD", flush=True)
