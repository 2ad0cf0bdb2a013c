"""Calibration data, for every command that looks at some."""

import argparse


def add_flags(parser: argparse.ArgumentParser, required: bool = False) -> None:
    parser.add_argument(
        "--calib", required=required, metavar="FILE|hub:NAME", help="calibration text: .txt, .jsonl or a data set"
    )
    parser.add_argument("--calib-samples", type=int, metavar="N")
    parser.add_argument("--calib-seqlen", type=int, metavar="L")
    parser.add_argument("--seed", type=int, metavar="S", help="which calibration blocks are drawn")
