"""One self-contained HTML page from a run folder: `hf-dsvllm report RUN`."""

from hf_dsvllm.report.writing import watch_run, write_report

__all__ = ["watch_run", "write_report"]
