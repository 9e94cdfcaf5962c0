"""Where the numbers of a table and of a parameter group lie in the memory that the Triton kernels read.

Plain numbers: tables.py writes by them without importing Triton, the kernels' modules read by them.
"""

from __future__ import annotations

# A row, in words of 8 bytes: addresses (0: none), and what every kernel asks for, in the first 64 bytes.
WEIGHT = 0
BACKUP = 1  # the weight itself where there is none
MOMENTUM = 2  # or Adam's mean
SIZE = 3
FIRST = 4  # block
GROUP = 5
MODEL = 6
SQUARE = 7  # Adam's mean of squares
LARGEST = 8
STEP = 9
STREAM = 10  # a number, not an address
ROW = 16  # 128 bytes: a line of the cache

# A group's hyper-parameters, in fp32.
RHO = 0  # divided by SHARE
ETA = 1
ADAPTIVE = 2  # this and what is called a flag: 0 or 1
RATE = 3  # where rates[group] points unless the learning rate is a tensor
DECAY = 4  # of weights
MU = 5  # momentum
KEEP = 6  # 1 - dampening; this and the next two are subtracted in double on the host as torch does
NESTEROV = 7  # flag
SIGN = 8  # -1 to maximize, else 1
MAX_NORM = 9
SHARE = 10
BETA1 = 11
KEEP1 = 12  # 1 - beta1
BETA2 = 13
KEEP2 = 14  # 1 - beta2
LOG1 = 15  # log(beta1)
LOG2 = 16
EPSILON = 17  # Adam's
DECOUPLED = 18  # flag
AMSGRAD = 19  # flag
SEED = 30  # 64 bits, for the table's random numbers
HYPER = 32
