"""Texts in many languages and forms, on which two tokenizers are tried."""

from __future__ import annotations

SAMPLES = {
    "English": "She sold twelve pens, kept three, and wondered whether that was unreasonable.",
    "code, tabs": "def mean(xs):\n\tif not xs:\n\t\treturn 0.0\n\treturn sum(xs) / len(xs)\n",
    "code, spaces": "for (int i = 0; i < n; ++i) {\n        total += a[i] * b[i];\n    }\n",
    "mathematics": "\\int_0^1 x^2\\,dx = \\frac{1}{3}, so ∑ᵢ pᵢ ≤ 1 ⇒ ∀ε>0: |x₁₂₃₄₅ − 67890.5| < ε",
    "German": "Größere Übungsräume heißen Säle; Füße müssen draußen bleiben.",
    "Vietnamese": "Buổi sáng, những người bạn của tôi thường uống cà phê ở góc phố.",
    "Russian": "Утром мы пили чай и спорили о том, кто пойдёт за хлебом.",
    "Chinese": "今天早上下了一场大雨，我们只好留在家里读书。",
    "Japanese": "駅前の小さなパン屋さんは、毎朝六時に焼きたてを並べます。",
    "Korean": "어제 산 책을 벌써 다 읽어서 도서관에 가려고 합니다.",
    "Arabic": "اشتريتُ خبزًا طازجًا من السوق، ثم عدتُ إلى البيت.",
    "Hindi": "कल शाम हम नदी के किनारे टहलने गए थे।",
    "Thai": "วันนี้อากาศดีมาก เราจึงเดินเล่นริมแม่น้ำ",
    "emoji": "Thanks 👍🏽! The family 👩‍👩‍👧‍👦 waves 🇳🇴🇧🇷 ❤️‍🔥",
    "combining marks": "Cafe\u0301 cre\u0300me, A\u030angstro\u0308m, e\u0323\u0302 (decomposed)",
    "compatibility": "ﬁne ２０２４ ™ ½ Ⅷ ㎏ \u00a0\u2003wide",
    "outer whitespace": "\n  it began, and it ended \t\n",
    "long whitespace": "a" + " " * 30 + "b\n\n\n\n\n\n\t\t\t\t\t\tc \u3000 d",
    "special-token look": "Write <eos>, </s>, <|im_end|>, <end_of_turn> or [SEP], never \\n.",
    "control characters": "bell\x07 zero\u200bwidth \ufeffBOM replaced \ufffd end",
}
CUT_SHORT = "It ends inside of 🤷🏽𠮷"
