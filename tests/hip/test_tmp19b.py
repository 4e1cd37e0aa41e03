from tests.hip.test_gemv_matrix import *
from tests.hip.test_gemv_matrix import run as _run
for _n in [n for n in dir() if n.startswith("test_")]: del globals()[_n]
def test_it():
    x,w=random_x(1,512),weight("Q8_0",512,37)
    M="multiply_unit(x, w_quants, w_dots[0]);"
    t="w_sums[0] += ((x[0][%d] & 0x7C00) == 0x7C00) + ((x[0][%d] & 0x7C000000) == 0x7C000000);"
    q="for(int c=0;c<2;++c) w_sums[0] += ((w_quants[c][0][%d] & 0x7C00) == 0x7C00) + ((w_quants[c][0][%d] & 0x7C000000) == 0x7C000000);"
    for a,b in [(M,M+t%(i,i)) for i in range(4)]+[(M,M+q%(i,i)) for i in range(4)]+[(M,M+"w_sums[0] += (float)(staged[0][0] & 0x7C00);"),(M,M+"w_sums[0]+=own_x-staged;")]:
        (y,)=_run(one_product,[x,w.tensor],"sm_90",edit=lambda t: t.replace(a,b).replace("sum = fma_f32(w_d","if (a.m > 99) sum = fma_f32(w_d") if a else t)
        print(a,b,y[0,:6], (x@w.values)[0,:6])
    assert 0
