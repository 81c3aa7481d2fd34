import gc, sys, tracemalloc
from collections import Counter
from tests.soak import kills
from tests.soak.kills import *
def go(rank,world,group):
    model,opt=build()
    for step in range(700): train_step(model,opt,step,rank)
    gc.collect(); a=Counter(type(o).__name__ for o in gc.get_objects()); tracemalloc.start(8); s=tracemalloc.take_snapshot(); r=resident_mib()
    for step in range(700,1700): train_step(model,opt,step,rank)
    gc.collect(); b=Counter(type(o).__name__ for o in gc.get_objects()); t=tracemalloc.take_snapshot()
    top=[str(x) for x in t.compare_to(s,"lineno")[:8]]
    return {"grow":(b-a).most_common(8),"top":top,"rss":resident_mib()-r}
if __name__=="__main__":
    v=run_ranks(2,go,timeout=250)[0].verdict
    print(v["grow"],v["rss"]); print("\n".join(v["top"]))
