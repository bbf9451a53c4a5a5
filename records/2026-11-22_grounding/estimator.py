"""Levina & Bickel's estimator with an averaged inverse: k - 1 or k - 2, with edges (cube) and without (flat torus); 2000 points, 3 seeds."""
import numpy as np
from sklearn.neighbors import NearestNeighbors
def inv(T): return np.log(T[:,-1:]/T[:,:-1]).sum(1)
def torus(N,d,k,g):   # exact geodesic distances of the flat torus, side 1
    X=g.uniform(size=(N,d)); D=np.zeros((N,N))
    for j in range(d):
        a=abs(X[:,j,None]-X[None,:,j]); a=np.minimum(a,1-a); D+=a*a
    D=np.sqrt(D); np.fill_diagonal(D,np.inf); return np.sort(np.partition(D,k,1)[:,:k],1)
def cube(N,d,k,g,skew=True):
    X=g.uniform(size=(N,d)); X=X@g.normal(size=(d,12)) if skew else X
    return NearestNeighbors(n_neighbors=k).fit(X).kneighbors()[0]
for d in (1,2,5):
  for k in (5,10,20):
    row=[]
    for f in (torus,cube):
        r=[]
        for s in range(3):
            T=f(2000,d,k,np.random.default_rng(s)); m=inv(T).mean()
            r.append(((k-2)/m,(k-1)/m))
        r=np.array(r); row.append(f'{f.__name__}: k-2 {r[:,0].mean():.3f}  k-1 {r[:,1].mean():.3f} sd {r[:,1].std():.3f}')
    print(d,k,'  |  '.join(row),flush=True)
