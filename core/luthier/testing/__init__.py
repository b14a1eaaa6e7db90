"""For plugin authors: conformance checks, tiny models, and stages run in the test's own process.

::

    from luthier.testing import check_component, run_stage, tiny_model

    def test_it_conforms():
        check_component(my_plugin.luthier_components()[0])
"""

from luthier.testing.conformance import check_component, findings_of
from luthier.testing.stages import TestContext, resealed, run_stage, tiny_dataset, tiny_model

__all__ = ["TestContext", "check_component", "findings_of", "resealed", "run_stage", "tiny_dataset", "tiny_model"]
