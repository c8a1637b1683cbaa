"""What `pytest --long` runs beside the rest: what takes longest, each of a kind of which another case runs always."""

import re

LONG = re.compile(
    "|".join(
        (
            r"laws\.py::test_one_graph\[(?!mrt\]|crs,ratio=0\.3\]|recompute\]|tome)",
            r"test_engine_compiled\.py::test_(regions_under_the_real_compiler|without_a_region.*as asked)",
            r"test_a_region_for_all_blocks_gives_the_numbers_of_eager\[(?!decatt)",
            r"test_budget\.py::test_peaks_are_within_the_size\[(?!decatt)",
            r"test_budget\.py::test_predicted_peak_is_the_measured_one\[(?!0\.5)",
            r"test_budget\.py::test_a_size_below_the_least_names_it",
            r"foreign/test_compiled\.py::test_(one_graph\[(?!recompute-hand)|compiled_steps)",
            r"foreign/test_(model|taken)\.py::.*\[.*(deit3|dinov2|siglip|beit|rope)",
            r"test_coverage\.py::test_intervals_of_(main|arms).*-(5|10)\]",
            r"account/test_step\.py::test_vit_b_16.*crs@0\.5",
            r"test_parallel\.py::test_ten_steps.*crs@0\.5",
            r"test_plugins\.py::test_the_laws_of_a_file",
            r"test_graphs\.py::test_(a_deep|recompute|flash)",
            r"test_recompute\.py::test_(the_compiler|recomputing_the_mlp_compiles)",
            r"test_vit\.py::test_equals_torchvision_vit_b_16",
            r"test_processes\.py::test_a_study_of_two_processes_is_that_of_one",
            r"test_processes\.py::test_a_lost_process",
            r"test_parallel\.py::test_the_compiled_step",
            r"test_launchers\.py::test_ray",
            r"test_run_weights\.py::test_pretraining_then",
            r"test_damage\.py::test_(a_full_disk|damaged_snapshots\[(truncated|emptied))",
            r"test_kills\.py::test_killed_(again|at_random_moments\[(compiled|graphed))",
            r"test_sharing\.py::test_two_at_once_and_one",
        )
    )
)
