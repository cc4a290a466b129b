"""The certificates of the short convolution's kernels."""

import pytest
import torch

from pdn.certification import certify
from pdn.certification.trials import ConvolutionConfiguration, convolution_problems
from pdn.ops.triton import continued
from pdn.ops.triton import convolution as kernels
from tests.ops.test_convolution import interpreted, plain


class TestCertification:
    @pytest.fixture(autouse=True)
    def empty_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PDN_CACHE", str(tmp_path))
        monkeypatch.setattr(certify, "_verdicts", {})

    def key(self, **changes) -> ConvolutionConfiguration:
        fields = dict(
            gpu="GPU",
            triton="3.7.1",
            kernels="abc",
            channels=8,
            width=4,
            dtype=torch.bfloat16,
            bias=True,
        )
        return ConvolutionConfiguration(**fields | dict(parameters=torch.float32) | changes)

    def tried(self, spoilt=None, **changes):
        def run(problem):
            results = problem.run(plain)
            if spoilt:
                results[spoilt] = results[spoilt] * 1.02
            return results

        return certify.certified(self.key(**changes), run, "cpu")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_right_kernels_are_certified(self, dtype):
        assert (
            self.tried(dtype=dtype)
            and self.tried(dtype=dtype, bias=False)
            and self.tried(dtype=dtype, parameters=dtype)
        )

    @pytest.mark.parametrize("spoilt", ["y", "dx", "dweight", "dbias"])
    def test_one_wrong_result_is_refused_loudly(self, spoilt):
        with pytest.warns(UserWarning, match="REFUSED"):
            assert not self.tried(spoilt)

    def test_every_configuration_has_its_file(self, tmp_path):
        changes = (
            dict(channels=16),
            dict(width=3),
            dict(dtype=torch.float32),
            dict(parameters=torch.bfloat16),
            dict(bias=False),
            dict(continued=True),
        )
        for change in {}, *changes:
            assert self.tried(**change)
        assert len(list(tmp_path.rglob("*convolution-*.json"))) == 1 + len(changes)

    def test_one_of_the_two_problems_has_documents(self):
        dense, documents = convolution_problems(self.key(), "cpu")
        assert dense.cu_seqlens is None and documents.cu_seqlens is not None

    @interpreted
    @pytest.mark.parametrize("form", [kernels, continued], ids=["whole", "continued"])
    def test_the_kernel_is_the_one_tried(self, form, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        cached = certify._convolution_usable, certify._unsupported
        try:
            for function in cached:
                function.cache_clear()
            sizes = 8, 4, torch.float32, torch.float32, True, form is continued
            configuration = torch.device("cpu"), *sizes
            assert certify.convolution_is_usable(*configuration)
            assert len(list(tmp_path.rglob("*convolution-*.json"))) == 1
            certify._convolution_usable.cache_clear()
            monkeypatch.setattr(certify, "_verdicts", {})
            monkeypatch.setenv("PDN_CACHE", str(tmp_path / "other"))
            right = form.forward_pass
            monkeypatch.setattr(
                form,
                "forward_pass",
                lambda *inputs, **options: [1.1 * y for y in right(*inputs, **options)],
            )
            with pytest.warns(UserWarning, match="REFUSED"):
                assert not certify.convolution_is_usable(*configuration)
        finally:
            for function in cached:
                function.cache_clear()
