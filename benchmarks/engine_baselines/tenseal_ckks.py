"""CKKS of TenSEAL on random vectors: each party encrypts, the server adds, a holder of the key decrypts.

Run by benchmarks/secure_sum.py with the interpreter of TenSEAL's environment; prints one line of JSON. Parameters: ring
8192, moduli of 60, 40 and 60 bits, 4096 values a ciphertext. All that is measured grows with the number of values, so
few of them are enough: python tenseal_ckks.py PARTIES VALUES
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import tenseal

PARTIES, VALUES = map(int, sys.argv[1:3])
SLOTS = 4096


def main() -> None:
    """Sum encrypted vectors, and check it."""
    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60])
    context.global_scale = 2**40
    updates = [np.random.default_rng(party).standard_normal(VALUES) * 1e-3 for party in range(PARTIES)]
    started, sent, found = time.perf_counter(), 0, []
    for start in range(0, VALUES, SLOTS):
        total = None
        for update in updates:
            data = tenseal.ckks_vector(context, update[start : start + SLOTS]).serialize()
            sent += len(data)
            part = tenseal.ckks_vector_from(context, data)
            total = part if total is None else total + part
        found += total.decrypt()
    seconds = time.perf_counter() - started
    error = float(np.abs(np.array(found)[:VALUES] - sum(updates)).max())
    print(json.dumps({"seconds": seconds, "bytes_up": sent / PARTIES, "error": error}))


if __name__ == "__main__":
    main()
