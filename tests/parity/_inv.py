import torch
from tests.parity.paged import *
from workers.attention.cpu import CpuAttention
torch.set_num_threads(2)
for H,KV in ((4,4),(4,2),(8,1)):
  for D in (16,32):
    for dt in (torch.float32,torch.bfloat16):
        s=AttentionShape(H,KV,D,D**-.5,16,dt,CPU); a=CpuAttention(s)
        T=70; seq=[[1]*T]; q=torch.randn(T,H,D,dtype=dt); k=torch.randn(T,KV,D,dtype=dt); v=torch.randn(T,KV,D,dtype=dt)
        def run(cuts):
            c=a.allocate(6); out=[]
            for s0,s1 in zip(cuts,cuts[1:]):
                a.begin(make_batch(seq,[(0,s0,s1-s0)],16)); out.append(a.attend(c,q[s0:s1],k[s0:s1],v[s0:s1]))
            return torch.cat(out)
        w=run([0,T])
        for cuts in ([0,5,45,46,70],list(range(T+1)),[0,33,70]):
            y=run(cuts); bad=(y!=w).any(1).nonzero().flatten().tolist()
            if bad: print(H,KV,D,dt,cuts[:6],'rows differ',len(bad),bad[:8],(y.float()-w.float()).abs().max().item())
print('done')
