"""Prompts of the usual benchmarks, and what is wrong with broken files."""

from __future__ import annotations

import json

import pytest

from mixdq_ao.errors import MixDQError
from mixdq_ao.evaluate import read_prompts

COCO = {
    "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}, {"id": 4, "file_name": "4.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 4, "caption": " A cat on a mat. "},
        {"id": 2, "image_id": 9, "caption": "A bus."},
        {"id": 3, "image_id": 4, "caption": "Another caption of the cat."},
    ],
}
MJHQ = {"ab12": {"category": "animals", "prompt": "a fox"}, "cd34": {"category": "food", "prompt": "soup, 8k"}}


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_coco_takes_the_first_caption_of_each_picture_in_their_order(tmp_path):
    found = read_prompts(write(tmp_path / "captions_val2014.json", COCO))
    assert found.texts == ("A cat on a mat.", "A bus.")
    assert found.files == ("4.jpg", "COCO_val2014_000000000009.jpg") and found.kind == "COCO"
    without = read_prompts(write(tmp_path / "c.json", {"annotations": COCO["annotations"]}))
    assert without.texts == found.texts and without.files is None and without.digest == found.digest


def test_mjhq_and_text(tmp_path):
    found = read_prompts(write(tmp_path / "meta_data.json", MJHQ))
    assert found.texts == ("a fox", "soup, 8k") and found.files == ("animals/ab12.jpg", "food/cd34.jpg")
    text = read_prompts(write(tmp_path / "p.txt", "\ufeffone\n\n  two  \n"))
    assert text.texts == ("one", "two") and text.files is None
    assert text.first(1).texts == ("one",) and text.first(None) is text and text.first(1).digest != text.digest
    with pytest.raises(MixDQError, match="count is 3, expected 1 to 2"):
        text.first(3)


def test_a_file_of_a_data_set_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(name, file, repo_type):
        asked.append((name, file, repo_type))
        if name == "no/such":
            raise OSError("404 not found\nfor url")
        return write(tmp_path / "meta_data.json", MJHQ)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert read_prompts("playgroundai/MJHQ-30K").texts == ("a fox", "soup, 8k")
    assert read_prompts("org/data:a/b.json").kind == "MJHQ"
    assert asked == [("playgroundai/MJHQ-30K", "meta_data.json", "dataset"), ("org/data", "a/b.json", "dataset")]
    with pytest.raises(MixDQError, match=r"no/such: is no file, and meta_data\.json .* cannot be had .*404 not found"):
        read_prompts("no/such")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not valid JSON"),
        ("[1]", "is list, expected COCO"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ({"annotations": []}, "annotations is list, expected a list that is not empty"),
        ({"annotations": [{"image_id": "4", "caption": "x"}]}, r"annotations\[0\]: has no whole number 'image_id'"),
        ({"annotations": [{"image_id": 4, "caption": " "}]}, r"annotations\[0\]: caption is ' '"),
        ({"images": 5, "annotations": COCO["annotations"]}, "images is int, expected a list"),
        ({"images": None, "annotations": COCO["annotations"]}, "images is NoneType, expected a list"),
        ({"images": [{"id": 4}], "annotations": COCO["annotations"]}, r"images\[0\]: expected a whole number"),
        ({"images": [{"id": 4, "file_name": "../x"}], "annotations": COCO["annotations"]}, r"images\[0\]"),
        ({"images": COCO["images"][:1], "annotations": COCO["annotations"]}, "picture 4 has a caption"),
        ({"x": {"prompt": "a"}}, "'x': is no entry with 'category' and 'prompt'"),
        ({"x": {"prompt": 3, "category": "c"}}, "'x': prompt is 3"),
        ({"../x": {"prompt": "a", "category": "c"}}, "is no entry"),
    ],
)
def test_broken_files_are_named(tmp_path, content, words):
    with pytest.raises(MixDQError, match=words) as error:
        read_prompts(write(tmp_path / "p.json", content))
    assert "p.json" in str(error.value)


def test_a_path_that_is_mistyped_is_not_looked_for_on_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **options: pytest.fail("asked the hub"))
    with pytest.raises(MixDQError, match="captions_val2014.json: cannot be read"):
        read_prompts("annotation/captions_val2014.json")


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes("grün".encode("latin-1"))
    for name, words in (("latin.txt", "is not UTF-8"), ("none.txt", "cannot be read"), ("none.json", "cannot be read")):
        with pytest.raises(MixDQError, match=words):
            read_prompts(tmp_path / name)
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(MixDQError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")
