import pytest

from vit_simple.sharing.markdown import fenced, markdown


@pytest.mark.parametrize(
    "text, shown",
    [
        ("<!-- vit_simple: end -->", "&lt;!-- vit_simple: end --&gt;"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)&gt;"),
        ("x](http://evil.example)\n\n## Heading", r"x\](http<!-- -->://evil.example) \#\# Heading"),
        ("\x1b]0;title\x07\x1b[2Jred\u202e", r" \]0;title  \[2Jred "),
        ("$5_$10 | `code` *bold* _thin_", r"\$5\_\$10 \| \`code\` \*bold\* \_thin\_"),
        ("www.evil.example me_1@evil.example", "www<!-- -->.evil.example me_1<!-- -->@evil.example"),
        ("4 x CPU @ 2.20GHz", "4 x CPU @ 2.20GHz"),
        ("__background__ a__b a_b", r"\_\_background\_\_ a\_\_b a_b"),
        ("- item", "&#45; item"),
        ("12. item", "&#49;2. item"),
        ("日本語 kočička 猫", "日本語 kočička 猫"),
        ("user/my_set-1.0 (a & b)", "user/my_set-1.0 (a &amp; b)"),
    ],
)
def test_foreign_text_is_shown_as_it_is(text, shown):
    assert markdown(text) == shown


def test_fence_is_longer_than_any_in_the_text():
    assert fenced("a\n````\nb", "bash") == "`````bash\na\n````\nb\n`````"


def test_code_has_neither_marks_nor_control_characters():
    assert fenced("<!-- vit_simple: end -->\x1b[2J", "yaml") == "```yaml\n<! -- vit_simple: end --> [2J\n```"
