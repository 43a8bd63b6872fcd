"""Drawn faces: support/demo_faces.py."""

from support.demo_faces import draw_face


def test_drawn_faces_are_a_function_of_seed_and_number():
    assert draw_face(0, 3).tobytes() == draw_face(0, 3).tobytes()
    assert len({draw_face(seed, i).tobytes() for seed in (0, 1) for i in range(3)}) == 6
