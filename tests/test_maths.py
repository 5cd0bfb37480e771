"""Mathematical answers: which answer is taken from a response, and when it equals the gold.

Each table has rows (gold, answers that are right, answers that are wrong), by kind.
"""
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.tasks import maths
from common.tasks.kinds import as_problem
from common.verifiers import BadProblem
from common.verifiers.boxes import boxes, last_boxed
from common.verifiers.equality import compare, reading, same
from common.verifiers.golds import normal_gold
from common.verifiers.thoughts import THOUGHTS, final_part


def wrong_verdicts(rows: list, judge) -> list[str]:
    """The answers of a table whose verdict is not the expected one."""
    found = []
    for gold, right, wrong in rows:
        found += [f"{gold!r} rejects {answer!r}" for answer in right if not judge(gold, answer)]
        found += [f"{gold!r} pays {answer!r}" for answer in wrong if judge(gold, answer)]
    return found


def judged(gold: str, text: str) -> bool:
    return compare(gold, text)[1]


# --------------------------------------------------------------------------------------------------
# equality: the answer as it stands in a box
# --------------------------------------------------------------------------------------------------
SAME = {
    "numbers are compared by value in every written form": [
        ("5", ["5", "5.", "5.0", "05", "+5", "$5$", r"\(5\)", "５", r"\text{5}", r"\mathbf{5}", "10/2", "five", r"{5}",
               r"\boxed{5}", "(5)", r"\frac{10}{2}", "2+3", r"\sqrt{25}", "5e0", "|-5|", r"\left(5\right)"],
         ["-5", "55", "5.01", "5.0001", "0.5", "5^2", "", "5?", "5!", "5x", "5i", "\\pm 5", "1/5", "6", "4.999999999",
          "5.00000001", r"\overline{5}", "5_8", "x", r"5 \text{ or } 6"]),
        ("1000000", ["1,000,000", "1 000 000", r"1{,}000{,}000", r"1\,000\,000", r"1,\!000,\!000", "1000000.00", "10^6",
                     "1e6", "1 million", "one million", r"1 \times 10^6", "1\u2009000\u2009000", "1\u00a0000\u00a0000",
                     "1'000'000", "10^{6}", "10**6", r"\$1{,}000{,}000"], ["1,000", "100,000,0", "1.000000", "10^5", "1 billion", "1,0"]),
        ("0.5", [".5", "1/2", r"\frac12", "0.50", "½", r"\dfrac{1}{2}", "50%", r"50\%", "2^{-1}", "5e-1", r"\tfrac12", "0.5000"],
         ["5", "0.05", "-0.5", "0.5%", "2", "0.51", "0.500001", ".05", "50"]),
        ("-18", ["−18", "–18", "﹣18", "－18", "- 18", "− 18", "-18.0", "‑18"], ["18", "+18", "--18", "1-8", "—"]),
        ("1234.5", ["1,234.5", "1234.50", r"1{,}234.5", "1 234.5", r"\frac{2469}{2}"], ["1,2345", "12345", "1.2345", "1234"]),
        ("2.75e11", [r"2.75 \times 10^{11}", r"2.75\cdot 10^{11}", "275000000000", "2.75E11", "2.75e+11", "275,000,000,000",
                     r"27.5 \times 10^{10}", "2.75×10¹¹", "2.75*10^11", "275 billion", r"2.75 \times 10^{11} \text{ m}"],
         [r"2.75 \times 10^{10}", "2.75", "2.75e12", r"2.75 \times 10^{-11}", "2.75^{11}", r"2.7 \times 10^{11}"]),
        ("0.0000001", ["1e-7", "1e-07", "10^{-7}", r"1 \times 10^{-7}", r"\frac{1}{10^7}"], ["1e-8", "0", "0.000001", "1e7"]),
        ("7", ["seven", "Seven", r"\text{seven}", "7.0"], ["eleven", "seventy", "seventy-seven"]),
        ("42", ["forty-two", "forty two", "42.0"], ["forty", "4 2", "4,2", "24"]),
        ("033", ["33", "033"], ["34", "3", "330"]),
    ],
    "exact numbers are compared exactly": [
        (r"\frac{1}{2^{99}}", [r"2^{-99}", r"\frac{2}{2^{100}}"], [r"\frac{1}{2^{98}}", "0", r"\frac{1}{2^{100}}", r"-\frac{1}{2^{99}}"]),
        (r"\frac{1}{2004!}", [r"\frac{1}{2004!}"], [r"\frac{1}{2006!}", r"\frac{1}{2005!}"]),
        ("2^{100}", ["1267650600228229401496703205376", "4^{50}"], ["1267650600228229401496703205377", "2^{101}", "1.2676506e30"]),
        (r"1+10^{-200}", [r"\frac{10^{200}+1}{10^{200}}"], ["1"]),
        (r"\sqrt{1+10^{-150}}", [r"\sqrt{10^{-150}+1}"], ["1"]),
        ("e^{-1000}", [r"\frac{1}{e^{1000}}"], ["e^{-1001}", "0", "1+e^{-1000}"]),
        (r"\frac13", ["1/3", r"0.\overline{3}", r"0.\bar{3}", "0.333...", "0.333…", "0.(3)", r"0.\dot{3}", r"0.3\overline{3}",
                      r"0.33\ldots", r"\frac{2}{6}", "⅓", r"33\frac{1}{3}\%", r"3^{-1}"],
         ["0.333", "0.3", "0.33333333333333", "0.34", "3", r"0.\overline{34}", "0.(4)", "33", "0.333333333333333333333333333333"]),
        (r"0.1\overline{6}", ["1/6", "0.1666...", "0.1(6)", r"\frac16"], ["0.16", r"0.\overline{16}", "0.1667", "0.17", "1.6"]),
        (r"\frac{1}{7}", [r"0.\overline{142857}", "0.142857142857..."], ["0.142857", "0.14"]),
        ("0.333", ["1/3", "0.333", "0.3330"], ["0.33", "0.3331", "0.334", "1/4", "0.333333"]),
        ("3.142", [r"\pi", "3.142"], ["3.14", "22/7", "3.1416", "3.141"]),
        ("0.15", ["3/20", "0.150"], [r"\frac{2}{13}", "0.1538", "0.2"]),
        ("1", [r"0.\overline{9}", "1.0", r"\frac{7}{7}", "e^0", r"\sin^2 x + \cos^2 x"], ["0.9", "0.999999999999999999"]),
        ("120", ["5!", r"\binom{10}{3}", r"\binom{10}{7}", r"\dbinom{10}{3}", "2^3 \\cdot 15"], ["6!", r"\binom{10}{4}", "5"]),
    ],
    "mixed numbers": [
        ("5/2", ["2 1/2", r"2\frac12", r"2\frac{1}{2}", r"2 \frac{1}{2}", "2½", "2.5", r"2\tfrac12", r"2 + \frac12"],
         ["21/2", "2/2", "1", r"2\cdot\frac12", "2 1/3", "2, 1/2", r"-2\frac12", "3/2", "2-1/2"]),
        ("-5/2", [r"-2\frac{1}{2}", "-2 1/2", "-2.5"], ["-1.5", "-3/2", "5/2"]),
        (r"1\frac{4}{5}", ["9/5", "1.8", r"\frac95"], ["4/5", "1.4", "14/5"]),
        (r"137 \frac{1}{2}", ["137.5", "275/2", "137 1/2"], ["68.5", "137", "1371/2"]),
        ("2 1/2", ["2.5", r"\frac{5}{2}"], ["21/2", "10.5", "1"]),
    ],
    "roots, e, pi and functions": [
        (r"4\sqrt{2}", ["4√2", "4sqrt(2)", r"4\sqrt2", r"\sqrt{32}", "4*sqrt(2)", r"4 \cdot \sqrt{2}", "2^{5/2}", r"\frac{8}{\sqrt 2}",
                        "4√(2)", r"2\sqrt{8}", r"\sqrt2 \cdot 4", "4*2^(1/2)", r"4\cdot 2^{\frac12}"],
         ["4", "5.65685424949238", r"\sqrt{2}", r"4\sqrt{3}", r"\sqrt[4]{2}", "42", "8", r"4+\sqrt2", r"-4\sqrt2", "5.657"]),
        (r"\frac{\sqrt{3}}{3}", [r"\frac{1}{\sqrt{3}}", r"\sqrt{3}/3", "√3/3", r"\sqrt{\frac13}", r"\tan 30^\circ", r"\tan(\pi/6)"],
         [r"\sqrt3", r"\frac{\sqrt{3}}{2}", "0.577"]),
        ("e^{2}", [r"\mathrm{e}^2", "e^2", r"\text{e}^{2}", r"\exp(2)", r"e \cdot e", r"\operatorname{e}^2"], ["2e", "e", "7.389", "e^{-2}", "e2"]),
        (r"288\pi", ["288pi", "288π", r"288 \pi", r"\pi \cdot 288", r"288\cdot\pi", "288*pi", r"288\pi \text{ cm}^2"],
         ["288", r"28\pi", r"288\pi^2", "904.78", r"\frac{288}{\pi}", "904.7786842"]),
        (r"\arctan 2", [r"\operatorname{arctan} 2", r"\tan^{-1}(2)", r"\arctan(2)", r"\mathrm{arctan}\,2", "arctan(2)", "atan(2)",
                        r"\tan^{-1} 2"], [r"\tan 2", r"\arctan 3", r"\arctan \frac12", "1.107"]),
        (r"\ln 2", [r"\ln(2)", r"\ln{2}", "ln 2", r"\frac12\ln 4", r"-\ln\frac12", r"\log_e 2"], [r"\log 2", "0.693", r"\ln 3", "2"]),
        ("3", [r"\log_2 8", r"\log_{2}{8}", r"\log 1000", r"\sqrt[3]{27}", r"\sqrt{9}", "27^{1/3}"], [r"\log_8 2", r"\ln 3"]),
        ("-2", [r"\sqrt[3]{-8}", "(-8)^{1/3}"], [r"\sqrt{-4}", "2"]),
        (r"2\sin x \cos x", [r"\sin 2x", r"\sin(2x)", r"2\cos x\sin x"], [r"\sin x", r"2\sin x", r"\sin 2x + 1"]),
        (r"\cot x", [r"\frac{1}{\tan x}", r"\frac{\cos x}{\sin x}", r"\cot{x}", r"\cot(x)"], [r"\tan x", "x", r"\cot y"]),
        (r"1+2\sqrt{3}", [r"2\sqrt3+1", "1+2√3", "1 + 2*sqrt(3)"], [r"3\sqrt3", r"1-2\sqrt3", "1+2"]),
        (r"\frac{-5+\sqrt{13}}{6}", [r"\frac{\sqrt{13}-5}{6}", r"-\frac{5-\sqrt{13}}{6}"], [r"\frac{-5-\sqrt{13}}{6}", r"\frac{5+\sqrt{13}}{6}"]),
        (r"\sqrt{2}+\sqrt{3}", [r"\sqrt{5+2\sqrt{6}}", r"\sqrt3 + \sqrt2"], [r"\sqrt5", "3.146264369941972"]),
        (r"6+9i", ["9i+6", r"6 + 9i", "3(2+3i)", r"6+9\mathrm{i}"], ["6-9i", "6+9", "15i", "9+6i"]),
        ("2i", [r"\sqrt{-4}", "2i"], ["-2i", "2", "-2"]),
        (r"\frac{1+\sqrt5}{2}", [r"\frac12+\frac{\sqrt5}{2}", r"\frac{2}{\sqrt5-1}"], ["1.618", r"\frac{1-\sqrt5}{2}"]),
        (r"\lfloor 3.7 \rfloor", ["3"], ["4"]),
    ],
    "expressions with variables are compared as functions": [
        ("4x+1", ["1+4x", "4*x+1", "4x + 1", "2(2x)+1", r"4 \cdot x + 1", "(4x+1)"], ["4", "4x", "4x-1", "4y+1", "x+4", "5x", "4X+1"]),
        ("6r^2-4r-24", ["6r^2 - 4r - 24", "2(3r^2-2r-12)", "6r²-4r-24", "-24-4r+6r^{2}"], ["6r^2-4r+24", "6x^2-4x-24", "6r^2"]),
        ("(a+5)(b+2)", ["(b+2)(a+5)", "ab+2a+5b+10", r"(a+5) \cdot (b+2)"], ["(a+2)(b+5)", "a+5", "(a+5)(b-2)", "(a+5), (b+2)"]),
        ("2k", [r"2 \cdot k", "2k", "k+k", "k*2"], ["2000", "2", "k", "2n", "k^2"]),
        (r"\frac{11+9a}{20}", [r"\frac{9a+11}{20}", "(11+9a)/20", r"\frac{11}{20}+\frac{9a}{20}"], [r"\frac{20}{11+9a}", "11+9a/20", "1"]),
        ("x^2", ["x^{2}", "x²", "x*x", "x**2"], ["2x", "x", "x^3", "x^2+0.001", "x_2"]),
        (r"\frac{1}{2x}", ["1/(2x)", r"\frac{1}{2}\cdot\frac1x", "(2x)^{-1}"], ["x/2", r"\frac{x}{2}", "1/2x"]),
        (r"\frac{n(n+1)}{2}", [r"\frac{n^2+n}{2}", r"\binom{n+1}{2}", "n(n+1)/2", r"\frac12 n(n+1)"], [r"\frac{n(n-1)}{2}", "n(n+1)"]),
        ("2^n - 1", ["2^{n}-1", "-1+2^n", r"2 \cdot 2^{n-1} - 1"], ["2^{n-1}", "2n-1", "2^n+1"]),
        ("|x|", [r"\sqrt{x^2}", r"\lvert x \rvert"], ["x", "-x"]),
        ("a_1", ["a_{1}", "a_1"], ["a_2", "a", "1"]),
        ("p - q", ["p-q", "-q+p", "-(q-p)"], ["q-p", "p+q"]),
        ("3R^2", ["3R²", r"3 \cdot R^2"], ["3r^2", "3R", "R^2"]),
        (r"\frac{x+2}{x-2}", ["(x+2)/(x-2)"], ["-1", r"\frac{x-2}{x+2}", "x"]),
        ("n!", ["n!", "n(n-1)!"], ["n", "(n+1)!", "n^2"]),
        (r"x^3+3x-6", ["x(x^2+3)-6", "3x + x^3 - 6"], ["x^3+3x+6", "x^3"]),
        ("18!", ["18!"], ["18", "17!"]),
        (r"\theta", ["θ", r"{\theta}"], [r"\phi", "t"]),
    ],
    "percent, degrees, currency and units are no part of the value, but must agree": [
        ("28\\%", ["28", "28%", r"28\%", "28 percent", r"28\text{ percent}", "0.28", "28 pct", r"\frac{28}{100}"], ["0.0028", "2.8", "2800", "72%", "0.28%"]),
        ("28", ["28%", r"28\%", "28 percent", "28 dollars", "28 apples", r"28 \text{ apples}", r"\text{28 apples}", "28 eggs per day", "28 years old"],
         ["0.28", "28/100", "28 dozen", "28 hundred", "28 thousand", r"28 \text{ halves}", "28 or 29", "28 plus 3", "28 minus"]),
        ("0.28", ["28%", "0.28"], ["28", "0.28%"]),
        ("0", ["0%", r"0\%"], ["1%"]),
        (r"30^\circ", ["30", "30°", "30 degrees", r"30^{\circ}", r"30\text{ degrees}", r"\frac{\pi}{6}", r"30\degree"], ["60", r"\frac{\pi}{3}", r"30\pi", "150"]),
        (r"\frac{\pi}{6}", [r"30^\circ", "π/6", "pi/6", r"\frac16\pi"], ["30", r"60^\circ", r"\frac{\pi}{3}"]),
        (r"\$18", ["18", r"\$18", "$18", "18 dollars", "18 USD", "$18.00", "18 dollars per day"], ["€18", "18 cents", "1.8", r"\$180", r"-\$18"]),
        ("18", [r"\$18", "18 dollars per day", "€18", r"18\text{ dollars}", "18 km/h", "18 mph"], [r"-\$18", r"\$-18", "18 million", r"\$1.8"]),
        (r"15\mbox{ cm}^2", ["15", r"15\text{ cm}^2", "15 cm²", "15 square centimeters", "15 cm^2", r"15\,\mathrm{cm}^2", "15 sq cm"],
         [r"15\text{ in}^2", "15 cm", "15 in²", r"15\text{ m}^2", "15 cm³", "225"]),
        (r"864 \mbox{ inches}^2", ["864", "864 in^2", r"864\text{ in}^2", "864 square inches"], ["864 cm^2", "864 inches", "864 in^3"]),
        (r"5.4 \text{ cents}", ["5.4", "5.4 cents", "5.4¢"], [r"\$5.4", "54", "5.4 dollars"]),
        ("5", [r"\text{5 apples}", r"5\text{ m}", "5 m", r"5\,\text{kg}", "5 men", "5 cm", r"5\ \mathrm{m/s}", "5 hours", "5 (apples)", r"5\text{ m/s}^2"],
         ["5m", "5x", "5 x", "5 hours 30 minutes", "5 feet 6 inches", "5 and 6", r"\text{5 and 6}", "5 x 6", "5 to 6", "5 of 6", "5 less than 9"]),
        ("10 m", ["10", "10 meters", r"10\text{ m}", "10 metres"], ["10 cm", "10 km", "10 m^2"]),
        ("60 km/h", ["60", r"60\text{ km/h}", "60 km per hour", "60 kilometers per hour"], ["60 m/s", "60 mph", "60 km"]),
        (r"\frac{270}7\text{ degrees}", [r"\frac{270}{7}", r"\frac{270}{7}^\circ", r"38\frac47"], ["38.57", "270"]),
        ("4000000", ["4 million", r"4\text{ million}", r"\$4 million", "4,000,000"], ["4", "4 billion", "40 million"]),
        ("24", ["2 dozen", "two dozen"], ["2", "12"]),
    ],
    "ratios, times, bases and labels": [
        ("3:4", ["3:4", "3 : 4", r"3\colon 4", r"\frac34", "3/4"], ["4:3", "3:5", "3", "34", "3.4", "3,4", "6:9"]),
        ("3:30", ["3:30", "03:30", "3:30 pm", r"3:30\text{ PM}"], ["3:31", "3.30", "330", "1:10", "3", "1/10"]),
        ("3:30 pm", ["3:30", "3:30 PM", "3:30 p.m."], ["3:30 am", "4:30 pm"]),
        ("1:2:3", ["1 : 2 : 3"], ["1:2", "3:2:1", "1/6"]),
        ("52_8", ["52_8", "52_{8}", r"52_{\text{eight}}", r"(52)_8", "52"], ["52_9", "42", "52_{10}", "25_8", "42_{10}", "53_8"]),
        ("4210_{5}", ["4210_5", "4210"], ["4210_6", "555", "421_5"]),
        ("42", ["42_{10}"], ["52_8", "42_5"]),
        ("A5_{16}", ["A5_{16}"], ["A6_{16}", "165"]),
        (r"\text{(B)}", ["B", "(B)", r"\textbf{(B)}", r"\text{B}", r"\mathrm{(B)}", r"\textbf{(B)}\ 12", "B.", r"\textbf{B}", "Option B"],
         ["A", "(C)", "12", "AB", r"\textbf{(C)}\ 12", "(B) or (C)", "B, C"]),
        ("B", ["(B)", r"\text{(B)}", "B", r"\textbf{(B) }12"], ["C", "(A)", "b^2", "8"]),
        ("12", [r"\textbf{(B)}\ 12", r"\textbf{(B) } 12", r"\text{(B) 12}"], [r"\textbf{(B)}\ 13", r"\textbf{(B)}"]),
        (r"\textbf{(B)}\ 12", ["B", "12", "(B)", r"\textbf{(B)} 12"], ["A", "13", "(C)"]),
        ("x", ["x", "(x)"], ["X", "y", "2x"]),
    ],
    "words": [
        (r"\text{Tuesday}", ["Tuesday", "tuesday", r"\text{tuesday}", r"\textbf{Tuesday}", "Tuesday."], ["Wednesday", "Thursday", "Tues and Wed", "not Tuesday"]),
        ("even", [r"\text{even}", "Even", r"\text{Even}", r"\mathrm{even}"], ["odd", "not even", "even or odd", "neven"]),
        (r"\text{Evelyn}", ["Evelyn", r"\text{ Evelyn }"], ["Carla", r"\text{Evelyn and Carla}", "Eve"]),
        ("Yes", [r"\text{Yes}", "yes", "YES"], ["No", "yes and no"]),
        ("no", ["No", r"\text{no}"], ["on", "yes", "none"]),
        ("Amy", [r"\text{Amy}"], ["May", "Mya"]),
        ("ABC", ["ABC"], ["ACB", "CBA", "AB"]),
        (r"\text{all real numbers}", ["all real numbers", r"\text{All real numbers}"], ["all integers", "real numbers except 0"]),
        ("True", [r"\text{True}", "true"], ["False"]),
    ],
    "equations": [
        ("5", ["x=5", "x = 5", r"n = 5", r"f(2)=5", r"\text{Area} = 5", "Area = 5", "2+3=5", r"x=\frac{10}{2}=5", r"|AB| = 5", "x_1=5", r"a_5 = 5", r"P = 5\%"],
         ["x>5", "x=6", "2x=5", "x+y=5", "x^2=5", "5=6", "x=5, y=6", r"x \ne 5", "x=5 or x=6", "4=5", "x=5=6", "x = 2+2 = 5"]),
        ("x=5", ["5", "x=5", "5=x", "x-5=0", r"x = \frac{10}{2}"], ["y=5", "x=6", "x>5", "-5", "x=5 or x=6", "5x", "x"]),
        ("y = 2x + 3", ["y=2x+3", "2x+3", "y=3+2x", "y-2x=3", "2x-y+3=0"], ["y=2x-3", "x=2y+3", "2x-3", "y=3x+2", "y>2x+3"]),
        ("5x - 7y + 11z + 4 = 0", ["10x-14y+22z+8=0", "5x-7y+11z=-4", "-5x+7y-11z-4=0"], ["5x-7y+11z-4=0", "5x-7y+11z+4", "5x-7y+11z+4=1"]),
        ("x^2+y^2=1", ["y^2+x^2=1", "x^2+y^2-1=0"], ["x^2-y^2=1", "x^2+y^2=2", "1"]),
        ("f(x) = x^2", ["x^2", "f(x)=x^2"], ["x^3", "f(x)=x"]),
        ("(x,y)=(3,2)", ["(3,2)", "(x, y) = (3, 2)", "x=3, y=2", r"x=3 \text{ and } y=2"], ["(2,3)", "3", "x=2, y=3"]),
        ("x=3, y=2", ["y=2, x=3", "(3,2)", r"x=3,\ y=2"], ["x=2, y=3", "x=3", "y=2"]),
        ("0.333", [r"\frac13 \approx 0.333", r"x \approx 0.333"], [r"\frac12 \approx 0.333"]),
        (r"\sqrt{2}", [r"\sqrt2 \approx 1.414", r"x = \sqrt{2} \approx 1.41"], [r"1.414", r"x \approx 1.414"]),
    ],
    "several values are a set": [
        ("1,-2", ["-2, 1", "1 and -2", r"\{1,-2\}", r"1 \text{ and } -2", "x=1, -2", "x = 1 or x = -2", r"x=1 \text{ or } x=-2", "1; -2", r"\{-2, 1\}", r"x\in\{1,-2\}",
                  "1 or -2", "-2,1,1"], ["1", "-2", "(1,-2)", "1,2", "1,-2,3", "-1,2", "1,-2,0", "[1,-2]", r"(-2, 1)"]),
        ("3, 5, 7", ["3,5,7", r"\{3,5,7\}", "7, 5 and 3", "3, 5, and 7", "3, 5 and 7"], ["3,5", "5", "3,5,8", "357", "(3,5,7)"]),
        (r"\{5,-2\}", ["5,-2", "x=5 or x=-2", "x = 5, x = -2", "-2 and 5"], ["5", "x=5", "(5,-2)", "{5,2}"]),
        (r"\pm 3", ["3,-3", r"\{-3,3\}", "x=3 or x=-3", r"x = \pm 3", "±3"], ["3", "-3", r"\pm 2", "3,3"]),
        (r"1 \pm \sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}", r"x = 1 \pm \sqrt{19}", r"\{1-\sqrt{19}, 1+\sqrt{19}\}"], [r"1+\sqrt{19}", r"\pm\sqrt{19}", r"-1\pm\sqrt{19}"]),
        (r"\{1\pm\sqrt{5},-2\}", [r"-2, 1+\sqrt5, 1-\sqrt5", r"1 \pm \sqrt 5, -2"], [r"1\pm\sqrt5", "-2"]),
        ("4", ["4", "4, 4"], ["4 and 9", "4, 9", "4 or 5", r"\{4, 9\}", "4; 5", r"4 \text{ and } 9", r"\pm 4", "3 < 4"]),
        ("(1,2),(2,1)", ["(2,1),(1,2)", "(2, 1) and (1, 2)", r"\{(1,2),(2,1)\}", "(1,2);(2,1)", r"(x,y)=(1,2),(2,1)"], ["(1,2)", "(1,2),(1,2)", "1,2,2,1", "(2,2),(1,1)"]),
        (r"\emptyset", [r"\varnothing", "∅", r"\{\}"], ["0", r"\{0\}"]),
        ("18, 19", ["18,19", "19, 18", "18 and 19"], ["18", "19", "18.19", "37", "1819"]),
        (r"\frac12, \frac13", ["1/2, 1/3", r"\frac13 \text{ and } \frac12", r"0.5, 0.\overline{3}"], ["0.5, 0.33", "1/2", "1/6"]),
    ],
    "tuples and vectors are ordered": [
        ("(3, 4)", ["(3,4)", r"\left(3,4\right)", "( 3 , 4 )", r"(3.0, \frac{8}{2})", "(x,y)=(3,4)", r"\langle 3,4\rangle"], ["(4,3)", "3, 4", "34", r"\{3,4\}", "[3,4]", "(3,4,5)", "3", "7"]),
        (r"\left( 3, \frac{\pi}{2} \right)", ["(3, π/2)", "(3,pi/2)", r"(3,\frac{1}{2}\pi)"], ["(π/2, 3)", "(3, 90)", "3", "(3, 1.57)"]),
        ("(1,200)", ["(1, 200)", "(1,200)"], ["1200", "(1200)", "(200,1)"]),
        (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", [r"\begin{bmatrix} 0.2 \\ -3.6 \end{bmatrix}", r"\begin{pmatrix} \frac15 \\ -\frac{18}{5} \end{pmatrix}", r"(1/5, -18/5)"],
         [r"\begin{pmatrix} 1/5 & -18/5 \end{pmatrix}", r"\begin{pmatrix} -18/5 \\ 1/5 \end{pmatrix}", "1/5", r"\begin{pmatrix} 1/5 \\ 18/5 \end{pmatrix}"]),
        (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", [r"\begin{bmatrix} -1 & 0 \\ 0 & -1 \\ \end{bmatrix}", r"\left(\begin{array}{cc} -1 & 0 \\[2pt] 0 & -1 \end{array}\right)"],
         [r"\begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix}", "-1", r"\begin{pmatrix} -1 & 0 \end{pmatrix}", r"\begin{pmatrix} 0 & -1 \\ -1 & 0 \end{pmatrix}"]),
        ("(0;-2;6)", ["(0,-2,6)"], ["(0,2,6)"]),
    ],
    "intervals and inequalities": [
        ("x>3", [r"(3,\infty)", "3<x", r"x \in (3, \infty)", "x > 3", r"x \gt 3", r"(3, +\infty)"], [r"x \ge 3", "x<3", "3", "y>3", r"[3,\infty)", "x=3", r"(-\infty,3)", "x>4"]),
        (r"(2,\infty)", ["x>2", r"2 < x", r"(2,+\infty)", "2<x<∞"], ["x<2", r"[2,\infty)", "(2,100)", r"x \geq 2"]),
        ("(3,4]", [r"3 < x \le 4", r"x\in(3,4]", r"\left(3,4\right]", "3<x<=4", "4 ≥ x > 3"], ["[3,4)", "(3,4)", "[3,4]", "3<x<4", "(3,5]"]),
        (r"x \in [-2,7]", ["[-2,7]", r"-2 \le x \le 7", r"-2\leq x\leq 7", "-2 <= x <= 7", "7 ≥ x ≥ -2"], ["(-2,7)", "-2<x<7", "[2,7]", r"y\in[-2,7]", "-2,7"]),
        ("(2,4)", ["2<x<4", "(2, 4)"], [r"2 \le x < 4", "[2,4]", "(4,2)", "2,4", "(2,4]"]),
        (r"(0,9) \cup (9,36)", [r"(9,36)\cup(0,9)", "0<x<9 or 9<x<36"], ["(0,36)", "(0,9)", r"[0,9) \cup (9,36)", "(0,9),(9,36)"]),
        (r"(-\infty, 2) \cup (3, \infty)", ["x<2 or x>3", r"x < 2 \text{ or } x > 3", "x>3 or x<2"], ["2<x<3", "x>3", r"(-\infty,2]\cup[3,\infty)", "x<3 or x>2"]),
        (r"k \ge 2", [r"k\geq 2", "k>=2", r"[2,\infty)", "2 ≤ k"], ["k>2", "2", "n \\ge 2", r"k \le 2"]),
        (r"(-\infty, 0]", [r"x \le 0", r"x\leq 0"], ["x<0", "0", r"(-\infty,0)", r"[0,\infty)"]),
        (r"x \ne 3", [r"x\neq 3", r"(-\infty,3)\cup(3,\infty)"], ["x=3", "3", r"x \ne 4"]),
        (r"\infty", ["∞", r"+\infty"], [r"-\infty", "0", "8"]),
        (r"-\infty", ["-∞"], [r"\infty"]),
    ],
    "numbers in words": [
        ("-4", ["negative four", "minus four", r"\text{negative } 4"], ["four", "not negative four"]),
        ("1.5", ["one and a half hours", "one and one half", "three halves"], ["one", "one and a third", "one and two"]),
        ("12", ["a dozen", "a dozen eggs", "12"], ["dozens"]),
        ("5", ["5 ✅", "5 😊"], ["5 ❌", "5 gross", "5 lakh", "5 repeating", "5 doubled", "5 grand", "five-fold", "five twelfths", "5 tenfold", "5 (unsure)", "twice x = 5", "not: 5",
                                 r"\text{half of } x = 5", "nothing is 5"]),
        ("500000", ["5 lakh"], ["5", "5 crore"]),
    ],
    "letters side by side are a product, behind a slash too": [
        (r"V(1-e^{-t/(RC)})", [r"V\left(1-e^{-\frac{t}{RC}}\right)", r"V(1-e^{-t/RC})", r"V-V e^{-\frac{t}{R C}}"], [r"V(1-e^{t/(RC)})", r"V(1-e^{-tC/R})", r"V e^{-t/RC}"]),
        (r"I(0) e^{-t/(RC)}", [r"I(0)\exp(-t/RC)", r"I(t) = I(0) e^{-\frac{t}{RC}}"], ["I(0)", r"I(0) e^{t/(RC)}", r"I(0)(1-e^{-t/RC})", "0"]),
        (r"\frac{GMm}{r^2}", ["F = GMm/r^2", r"\frac{G M m}{r^2}"], [r"\frac{GM}{r^2}", r"\frac{GMM}{r^2}", r"-\frac{GMm}{r^2}"]),
        ("f(0)", ["f(0)"], ["0", "g(0)", "f(1)"]),
        ("0", [r"\sin \pi"], ["f(0)", "I(0)"]),
    ],
    "units behind a slash or an article; the real numbers": [
        ("5", ["$5/hour", "$5 a day", "5 pts", "5 o'clock", "5️⃣"], ["5/x", "5 a", "5/six", "5,5", "5/half"]),
        (r"6.67 \times 10^{-11}", [r"6.67 \times 10^{-11} \text{ N m}^2/\text{kg}^2"], [r"6.67 \times 10^{-11} x"]),
        (r"\mathbb{R}", ["all real numbers", r"(-\infty, \infty)", r"x \in \mathbb{R}"], [r"\mathbb{Z}", r"(0, \infty)", "R^2"]),
    ],
    "a set of sets, a small rounded gold, percent and degrees, a name on the right": [
        (r"\{1,2,4\}", ["4, 2, 1"], [r"\{1,2\}, \{4\}"]),
        ("0.001", [r"\frac{1}{1000}", "10^{-3}"], [r"\frac{1}{999}", r"\frac{1}{1001}"]),
        (r"90^\circ", ["90"], [r"90\%"]),
        ("5", ["5 = x"], ["5 = 2x"]),
        ("f(x)=x", [r"f(x) = x \text{ for all } x", "f(x)=x for all real x"], [r"f(x) = x \text{ for even } x"]),
        (r"\binom{2n}{n}", [r"{2n \choose n}"], [r"{2n \choose 2}"]),
    ],
    "sums and integrals, by math-verify": [
        (r"\sum_{k=1}^{n} k", [r"\sum_{k=1}^{n} k", r"\sum_{j=1}^n j"], [r"\sum_{k=1}^{n} k^2", r"\sum_{k=0}^{n-1} k"]),
        (r"\int_0^1 x^2\,dx", [r"\frac{1}{3}"], [r"\frac12", "3"]),
    ],
}


@pytest.mark.parametrize("law", SAME)
def test_same(law):
    assert wrong_verdicts(SAME[law], same) == []


# --------------------------------------------------------------------------------------------------
# which answer is taken from a response
# --------------------------------------------------------------------------------------------------
TAKEN = {
    "a box that is a part of a term, a pair, a choice or a doubt is no answer": [
        ("5", [r"$x = \boxed{5}$.", r"$$\therefore \boxed{5}$$", r"$2+3=\boxed{5}\text{ cm}^2$", r"$\boxed{5}\%$", r"$\angle A = \boxed{5}^\circ$", r"$\boxed{5} \pmod{7}$", r"$(\boxed{5})$", r"<b>\boxed{5}</b>", "> \\boxed{5}",
               r"\begin{align*} x &= 3 + 2\\ &= \boxed{5}. \end{align*}", r"costs $5, so $x = \boxed{5}$", r"She has $18. So \boxed{5}, i.e. $5 a day", r"$\boxed{5} = 2+3$", r"$\boxed{5} \approx 5.0$", r"$\boxed{5}$ plus signs",
               r"$\boxed{5}$ times in all", r"$\boxed{5}$ to the nearest integer", r"$\boxed{5}$ and we are done", r"\boxed{5} (not 6)", r"Not 6 but \boxed{5}", r"{\color{red}\boxed{5}}", r"\boxed{**5**}", r"$a=3,\ b=\boxed{5}$"],
         [r"-\boxed{5}", r"2\boxed{5}", r"\boxed{5}0", r"\boxed{5}.5", r"\boxed{5}\%5", r"$10 - \boxed{5}$", r"$\pm\boxed{5}$", r"$\log\boxed{5}$", r"$\sin(\boxed{5})$", r"$f(\boxed{5})$", r"$x_{\boxed{5}}$", r"$x\boxed{5}$",
          r"$\binom{\boxed{5}}{2}$", r"$2 : \boxed{5}$", r"$\boxed{5} : 2$", r"$\boxed{5}+C$", r"$\boxed{5} + x$", r"$\boxed{5} < x$", r"$\boxed{5}_{6}$", r"$\boxed{5}!$", r"$\boxed{5} = 6$", r"$\boxed{5} \cup \{6\}$", r"$\{\boxed{5}, 6\}$",
          r"$(\boxed{5}, 6)$", r"(\boxed{5}, 6)", r"$(x, y) = (\boxed{5}, 6)$", r"\[ 10\cdot\boxed{5} \]", r"\(\boxed{5} \bmod 6 + 1\)", r"\boxed{5} million", r"$\boxed{5}$ thousand", r"$\boxed{5}\text{ million}$", r"\boxed{5} squared",
          r"\boxed{5} and a half", r"\boxed{5} or more", r"\boxed{5} to 9", r"\boxed{5} and 6", r"$\boxed{5}$ or $x = 6$", r"\boxed{5} (or 6)", r"\boxed{5}, maybe 6", r"\boxed{5}?", r"\boxed{5} (I am not sure)", r"maybe \boxed{5}",
          r"either 4 or \boxed{5}", r"between 4 and \boxed{5}", r"The answer is not \boxed{5}.", r"It cannot be $\boxed{5}$.", r"It isn't \boxed{5}", r"more than \boxed{5}", r"\boxed{5} $\times 10^3$"]),
        ("5000000", [r"\boxed{5} million", r"$\boxed{5}\text{ million}$"], [r"\boxed{5}"]),
        (r"\text{(B)}", [r"the answer is $\boxed{\text{(B)}} 3(1+r)^x = 7$."], []),
    ],
    "an answer that is taken back, denied or supposed is none": [
        ("5", [r"\boxed{5}. Wait, let me verify: 2 + 3 = 5. The answer is 5.", r"\boxed{5}. If you got 6, that is incorrect.", "The answer is 5. It is not 6, which is wrong.", "Since it is not 0, the answer is 5.", "If x = 2, then the answer is 5.",
               r"\boxed{6}. Wait, that is wrong. The answer is 5.", "It should be clear that the answer is 5.", "I think the answer is 5.", "The answer is 5 rather than 6.", "Answer: Janet makes $5 every day.", "Answer: 5 ways to choose.", "The answer, then, is 5.", "So the answer we get is 5.", "The answer is definitely 5."],
         [r"\boxed{5}. Wait, that is wrong. The answer is 6.", r"$\boxed{5}$. Actually no, the correct answer is $6$.", r"\boxed{5} is wrong.", r"\boxed{5}. Oops, I made a mistake.", "The answer is 5, which is wrong.", "The answer is 5. Hmm, that can't be right.",
          "I don't think the answer is 5.", "It is not true that the answer is 5.", "If the answer is 5, we get a contradiction.", "Suppose the answer is 5.", "A common mistake is to say that the answer is 5.", "You might think the answer is 5.", "I doubt that the answer is 5.",
          "An upper bound for the answer is 5.", "Answer: Nobody has 5.", "The answer is 5, then doubled: 10.", "The answer is 5 per day for 3 days.", "The answer is 5\n\nor 6.", "Final answer:\n\nx = 5\ny = 6"]),
    ],
    "tags and JSON mark an answer": [
        ("5", ["<answer>5</answer>", "<answer> \\boxed{5} </answer>", "<answer>5 apples</answer>", "<answer>The answer is 5.</answer>", "<answer>6</answer> Wait. <answer>5</answer>", r"\boxed{6} <answer>5</answer>", '{"answer": 5}', '{"why": "2 + 3", "answer": "5"}', "{'answer': 5}"],
         ["<answer>5", "<answer>5 or 6</answer>", "<answer>not 5</answer>", "<answer></answer> 5", "<answer>6</answer> 5", "<answer>5</answer> Actually, the answer is 6.", r"<answer>5</answer> \boxed{6}", '{"answer": 50}', '{"answer": "5 or 6"}', '{"answer": 6, "guess": 5}', '{"answer": null, "x": 5}']),
        (r"\frac{1}{2}", [r'{"answer": "\frac{1}{2}"}', r'{"answer": "\\frac{1}{2}"}'], []),
    ],
    "the last complete box counts, and an unfinished one is no answer": [
        ("2", [r"\boxed{2}", r"So $\boxed{2}$.", r"\boxed{1} is wrong. It is \boxed{2}.", r"\boxed{\boxed{2}}", r"\[ \boxed{2} \]", r"\boxed {2}", r"\fbox{2}",
               r"\boxed{2} apples", r"\boxed{2}, which is what we wanted. The answer is clear.", "\\boxed{\n2\n}", r"\boxed{2}" + 3000 * " and so on", r"x = \boxed{2}",
               r"\boxed{2}!", r"**\boxed{2}**", r"- \boxed{2}", r"The answer is 3. \boxed{2}", r"\boxed{2} \boxed{2}", r"\boxed{2}\%", r"$\boxed 2$", r"\boxed{2}" "\n\n**Final Answer**\n" r"\boxed{2}",
               r"\boxed{x = 2}", r"\boxed{2 \text{ apples}}", r"\boxed{3}. Wait, so \boxed{2}", r"\boxed{1}, so \boxed{2}", r"#### 7" "\n" r"\boxed{2}"],
         [r"\boxed{1} and \boxed{2}", r"\boxed{2} or \boxed{3}", r"\boxed{2", r"\boxed{2} then \boxed{3", r"\boxed{2}, \boxed{3}", r"\boxed{}", r"\boxed{2} and \boxed{}",
          r"\boxed{2}\sqrt{3}", r"$-\boxed{2}$", r"\boxed{2}^3", r"\boxed{2 \text{ or } 3}", r"\boxed{2}" "\n" r"\boxed{3}", r"The answer is 2. \boxed{3}", r"\boxed{?}", r"\boxed{\text{about } 2}", r"\boxed{2?}",
          r"x=\boxed{2}$ and $y=\boxed{3}$", r"\boxed{2} \times 10^3", r"\boxed{2}/3", r"\boxed{12}", r"\boxed{\text{maybe } 2}", "2", r"\boxed", r"\boxed{\frac{2", r"\boxed{2}. No, \boxed{3}."]),
        (r"\frac{1}{2}", [r"\boxed{\frac{1}{2}}", r"$\boxed{\dfrac12}$.", r"\boxed{ \frac{1}{2} }"], [r"\boxed{\frac{1}{2}", r"\boxed{\frac{1}{3}}"]),
        (r"\{1, 2\}", [r"\boxed{1} and \boxed{2}", r"\boxed{1}, \boxed{2}", r"$\boxed{1}$ and $\boxed{2}$", r"\(\boxed{2}\) or \(\boxed{1}\)", r"x = \boxed{1} and x = \boxed{2}", r"\boxed{1,2}", r"\boxed{1 \text{ and } 2}",
                       r"\boxed{1} \quad \text{and} \quad \boxed{2}", r"\boxed{1}" "\n" r"\boxed{2}", r"\boxed{x=1} or \boxed{x=2}"],
         [r"\boxed{1}", r"\boxed{2}", r"\boxed{1} and \boxed{3}", r"\boxed{1}, so \boxed{2}", r"\boxed{1} is a first guess. \boxed{2}"]),
        ("x=3, y=2", [r"x = \boxed{3} and y = \boxed{2}", r"\boxed{x=3}, \boxed{y=2}"], [r"\boxed{3}"]),
        (r"\{3,4\}", [r"\boxed{\{3,4\}}"], [r"\boxed{3,5}"]),
    ],
    "without a box the last marked answer counts": [
        ("18", ["#### 18", "So.\n#### 18", "####18", "#### 18 eggs per day\nShe sells the rest.", "#### $18", "#### **18**", "The answer is 18", "The answer is 18.", "The answer is: 18", "**Answer**: 18", "**Answer:** 18", "Answer: 18",
                "Answer:\n18", "Answer:\n\n18 eggs", "### Final Answer\n\n18", "**Final Answer**\n18", "**Final Answer:** 18", "Final answer: 18", "Final Answer\n\n$18$", "## Answer\n\n18", "### Answer: 18", "The final answer is $18$.",
                "The final answer is **18**.", "**The answer is 18.**", "The answer is **18** dollars.", r"The answer is \(18\).", "The answer is\n\\[\n18\n\\]", "The answer is:\n$$18$$", "The answer is `18`", 'The answer is "18"',
                "The answer is 18 because 2 * 9 = 18.", "The answer is 18, which is 2 * 9.", "The answer is 18 (since 2 * 9 = 18).", "The answer is x = 18.", "The answer is 2*9 = 18.", "The answer is 4+14=<<4+14=18>>18.", r"The answer is \$18 per day.",
                "The answer is 18 dollars per day, since she sells 9.", "The answer is 17. No: the answer is 18.", "The answer is 18. I hope this answer is helpful.", "answer = 18", "The answer to this problem is 18.", "The correct answer is 18.",
                "The answer is eighteen.", "The answer is not known. The answer is 18", "The answer is 18\n" + 3000 * "and so on ", "The answer is 18. A common wrong answer is 12.", "The answer is the number 18.", "The answer is 18 in all",
                "ANSWER: 18", "Ans: 18", r"\textbf{Answer:} 18", "The answer is 18. The answer is", "Therefore, the answer is:\n\n**18**", "> **Answer:** 18", "- Answer: 18", "The answer is 18 eggs and she sells them.", "Answer - the answer is 18",
                "The answer is therefore 18.", "The answer is exactly 18.", "The answer is $18 in total.", "The answer is 18 , as shown.", "Final Answer: The final answer is $18$. I hope it is correct.", "The answer is 18 — as expected.", "The answer is 18; see above.", "The answer is $\\frac{36}{2}$.", "**Answer: 18 eggs**", "__Answer:__ 18",
                "The answer would be 18.", "So the answer is 18 apples", "The answer is 18.0", "#### Answer: 18", "#### 18.", "*Answer:* 18"],
         ["18", "So she has 18", "", "The answer is 18 or 19", "The answer is 18 and 19.", "The answer is between 18 and 20", "The answer is at least 18", "The answer is not 18", "The answer is not 18 but 27.", "The answer is maybe 18", "The answer is 18, or maybe 19.", "The answer is 18?",
          "The answer is 18. Wait, no: the answer is 3", "The answer is the larger of 18 and 5", "The answer is the sum of 18 and 3", "Answer: Is 18 or 58 larger? 58.", "#### Step 18: compute", "The answer is 18√2", "The answer is 18x+1", "The answer is 18 million", "The answer is 18 and 9", "The answer is 18/5", "The answer is 18 \\cdot 2",
          "The answer is 18^2", "The answer is 1", "The answer is 180", "The answer is −18", "The answer is - 18", "The answer is 18.5", "The answer is 18, but it could be 19.", "#### 19", "#### 18\n#### 19", "The answer is 12. Check: 18", "A wrong answer is 18", "The answer is 18 if x > 2", "The answer is 18%3", "The answer is 18 to 20", "The answer is 18–20", "The answer is 18, 19 or 20",
          "The answer is either 18 or 19", "The answer is 18 plus 3", "The answer is 18 dozen", "#### 18 or 19", "The answer is 18 - 3", "The answer is $18$ or $19$.", "The answer is $18$\\sqrt{2}", "The answer is 18:30", "The answer is (18, 3)", "The answer is x > 18", "The answer is 18 hundred", "The answer is twice 18", "The answer is 18 squared", "The answer is 18 + x", "The answer is 18 in hexadecimal", "The answer is 18 (base 7)", "The answer is 18 by 12",
          "The answer is 18 with remainder 2", "The answer is 18 provided n > 3", "The answer is 18 is wrong."]),
        ("4", ["The answer is 4", "#### 4"], ["The answer is − 4", "The answer is 4√2", "The answer is 4x+1", "The answer is 4 million", "The answer is 4 and 9", r"The answer is 4\sqrt{2}", "The answer is 4 or so", "The answer is 4 times 3", "The answer is 4 2", "The answer is — 4", "The answer is 4e3", "The answer is 4i",
                                              r"The answer is 4^\circ\sqrt2", "The answer is 4 hundredths", "The answer is 4 1/2", "The answer is 4½", "The answer is 4, 5", "The answer is 4π", "The answer is 4 pi", "The answer is 4.2", "The answer is log 4", "The answer is 4:5", "The answer is 4 halves", "The answer is 4 over 3"]),
        ("-18", ["#### - 18", "#### –18", "#### −18", "The answer is −18.", "The answer is - 18", "Answer: –18", "The answer is **-18**"], ["#### 18", "The answer is 18", "The answer is 3-18"]),
        ("73", ["### Final Answer\n\n73", "### Final Answer:\n73", "**Final Answer**\n\n73", "# Final answer\n\n\\[73\\]", "**Final Answer**: 73", "The answer is 73."], ["### Final Answer\n\n74", "### Final Answer", "### Answer the question\n\n73", "Final answers vary: 73"]),
        (r"4\sqrt{2}", ["The answer is 4√2.", r"The answer is $4\sqrt{2}$.", "#### 4√2", r"Answer: $4\sqrt{2}$ cm", "The answer is 4 * sqrt(2)"], ["The answer is 4"]),
        ("4x+1", ["The answer is 4x+1.", "The answer is $4x + 1$, where x is an integer.", "Answer: 4x + 1", "#### 4x+1"], ["The answer is 4x"]),
        (r"\text{Evelyn}", ["The answer is Evelyn.", "Answer: **Evelyn**", "The answer is Evelyn because she ran.", "#### Evelyn", "Final Answer: Evelyn"], ["The answer is Carla.", "The answer is Evelyn or Carla.", "The answer is not Evelyn"]),
        ("(B)", ["The answer is B.", "The answer is (B).", "Answer: B", "The correct answer is **(B)**", "The answer is option B.", "Answer: (B) 12", "The answer is B"], ["The answer is A.", "The answer is A or B", "Answer: B or C", "The answer is b or c"]),
        ("{1, 2}", ["The answer is 1 and 2.", "The answer is x = 1 or x = 2.", "The answer is {1, 2}.", "Answer: 1, 2"], ["The answer is 1.", "The answer is (1, 2)."]),
        ("3.5", ["The answer is 3.5.", "The answer is 3.50 meters.", "Answer: $3.5$", "The answer is 7/2.", "The answer is 3 1/2."], ["The answer is 3.", "The answer is 3. 5 apples", "The answer is 35"]),
        ("1000", ["The answer is 1,000.", "The answer is $1,000.", "#### 1,000", "The answer is 1 000 km."], ["The answer is 1", "The answer is 1,0000"]),
    ],
}


@pytest.mark.parametrize("law", TAKEN)
def test_taken(law):
    assert wrong_verdicts(TAKEN[law], judged) == []


# --------------------------------------------------------------------------------------------------
# numbers in every written form: the same value is right, another one is wrong
# --------------------------------------------------------------------------------------------------
def decimal(value: Fraction) -> str:
    """The decimal of a number that has finitely many, digit by digit."""
    digits, rest = str(abs(value) // 1), abs(value) % 1
    if rest:
        digits += "."
    while rest:
        rest *= 10
        digits += str(rest // 1)
        rest %= 1
    return "-" * (value < 0) + digits


def recurring(value: Fraction) -> tuple[str, str]:
    """The decimal of any number: the digits that stand once, and the block that recurs."""
    digits, rest, seen = "", abs(value) % 1, {}
    while rest not in seen:
        seen[rest] = len(digits)
        rest *= 10
        digits += str(rest // 1)
        rest %= 1
    start = seen[rest]
    return f"{'-' * (value < 0)}{abs(value) // 1}.{digits[:start]}", digits[start:]


def fraction_forms(value: Fraction) -> list[str]:
    over, under, minus = abs(value.numerator), value.denominator, "-" * (value < 0)
    whole, rest = divmod(over, under)
    once, block = recurring(value)
    forms = [f"{minus}{over}/{under}", f"{minus}\\frac{{{over}}}{{{under}}}", f"\\frac{{{minus}{over}}}{{{under}}}",
             f"{minus}\\dfrac{{{3 * over}}}{{{3 * under}}}", f"\\boxed{{{minus}{over}/{under}}}", f"{minus}{over} / {under}",
             f"y = {minus}\\tfrac{{{over}}}{{{under}}}", f"$ {minus}{over}/{under} $", f"{minus}({over} \\div {under})",
             f"{minus}{over} \\cdot {under}^{{-1}}", f"−{over}/{under}" if minus else f"+{over}/{under}"]
    if whole and rest:
        forms += [f"{minus}{whole} {rest}/{under}", f"{minus}{whole}\\frac{{{rest}}}{{{under}}}"]
    if len(block) < 20:
        forms += [f"{once}\\overline{{{block}}}", f"{once}({block})", f"{once}{block}{block}{block}..."]
    return forms


def decimal_forms(value: Fraction) -> list[str]:
    text = decimal(value)
    whole, point, rest = text.partition(".")
    scaled = decimal(value / 1000)
    forms = [text, f"{int(whole):,}{point}{rest}" if whole not in ("-0", "0") else text, f"{scaled}e3", f"{scaled} \\times 10^{{3}}",
             f"{scaled}×10³", f"{decimal(value * 100)}e-2", f"{text} \\text{{ apples}}", f"\\text{{{text} apples}}", f"\\mathbf{{{text}}}",
             text.translate(str.maketrans("0123456789", "０１２３４５６７８９")), text.replace("-", "−"), text.replace("-", "– "), f"y={text}",
             f"{text} \\text{{ cm}}^2", f"\\${text}".replace("$-", "$ -") if value >= 0 else text, text + ("0" if point else ".0")]
    if value.denominator == 1 and abs(value) >= 1000:
        grouped = f"{int(value):,}"
        forms += [grouped.replace(",", "{,}"), grouped.replace(",", " "), grouped.replace(",", "\\,"), grouped.replace(",", "\u202f"), grouped.replace(",", ",\\!")]
    return forms


whole_numbers = st.integers(-(10**7), 10**7).map(Fraction)
decimals = st.builds(lambda n, k: Fraction(n, 10**k), st.integers(-(10**6), 10**6), st.integers(1, 5))
fractions = st.builds(Fraction, st.integers(-300, 300), st.integers(2, 99))


@example(value=Fraction(1201, 500), other=Fraction(2201, 500), which=11)  # 2 201/500
@given(value=whole_numbers | decimals | fractions, other=whole_numbers | decimals | fractions, which=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_a_number_is_its_value_in_every_form(value, other, which):
    def forms(number: Fraction) -> list[str]:
        finite = 10**9 * number % 1 == 0
        return fraction_forms(number) + (decimal_forms(number) if finite else [])

    own = forms(value)
    gold = own[which % len(own)]
    for text in (own[which // 31 % len(own)], own[which // 997 % len(own)]):
        assert same(gold, text), (gold, text)
    for number in {other, value + Fraction(1, 10**9), -value, 10 * value, value + 1} - {value}:
        text = forms(number)[which % len(forms(number))]
        assert not same(gold, text), (gold, text)


# --------------------------------------------------------------------------------------------------
# bounds: nothing that a model writes takes long
# --------------------------------------------------------------------------------------------------
HUGE = [
    "9**9**9", "10^{10^{10}}", "1e999999999", "99999!", "2000!^{2000!}", "2^{2^{2^{2^{2^2}}}}", "9" * 1999, "{" * 900 + "5" + "}" * 900,
    "(" * 900 + "5", r"\frac{" * 300 + "1", r"\sqrt{" * 200 + "2" + "}" * 200, "1+" * 900 + "1", r"1\pm1" * 300, "x=" * 500 + "1", "1:" * 500 + "1",
    r"\binom{10^9}{10^8}", r"\sin(10^{5000})", r"\exp(\exp(\exp(10)))", "(1/3)^{20000}", "0^0", "1/0", r"\tan 90^\circ", "((x!)!)!", r"\text{" * 100,
    "|" * 100, "\ud800", "\0", "\\", "(x+y)^{5000}", "n^{n^{n}}", ", ".join(f"\\sqrt{{{i}}}" for i in range(120)), "million " * 400,
]


@pytest.mark.parametrize("gold", ["5", "x^2+1", r"\{1,2\}", "x>3", r"\sqrt{2}", "0.333", "n^{n^{n}}"])
def test_a_verdict_is_bounded_whatever_stands_there(gold):
    start = time.perf_counter()
    for text in HUGE:
        right = judged(gold, f"\\boxed{{{text}}}") or judged(gold, f"The answer is {text}.")
        assert right == (gold == text), text
    assert time.perf_counter() - start < 30  # 1 second on a quiet machine


@given(st.lists(st.sampled_from([r"\boxed{", "}", "{", r"\frac", "^", "_", "$", "9", "-1", "x", "=", ",", r"\sqrt", r"\pi", "The answer is ", "#### ",
                                 "!", "e", "i", "(", ")", "[", "]", "|", r"\pm", "%", r"\cup", " or ", "0.", "...", "<", r"\text{"]), max_size=12).map("".join))
@settings(max_examples=100, deadline=None)
def test_any_text_gets_a_verdict(text):
    for gold in ("5", r"\frac{\pi}{2}", "(1,2)", "x>3"):
        found, right = compare(gold, text)
        assert found or not right


# --------------------------------------------------------------------------------------------------
# golds
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("gold, shown, right, wrong", [
    ('["18"]', "18", "18", "19"), ('["18", "19"]', "18, 19", r"\{19, 18\}", "18"), ("2.75e11", r"2.75 \times 10^{11}", r"2.75 \times 10^{11}", "2.75"),
    ("61 (cookies)", "61", "61", "16"), ("1 000 000", "1000000", "1,000,000", "1"), ("2 1/2", r"2\frac{1}{2}", "2.5", "10.5"), ("1e-07", "0.0000001", "10^{-7}", "0"),
    ("27.0", "27", "27", "270"), (r"$\boxed{7}$", "7", "7", "8"), ("[1, 2]", "[1, 2]", r"1 \le x \le 2", "1"), ("f(x) = 2x (for all x)", "f(x) = 2x (for all x)", "2x (for all x)", "2x+1"),
    ("3/4 (of the cake)", "3/4", "0.75", "4/3"), ("-5 (degrees)", "-5", "-5", "5"), ("0.5", "0.5", "1/2", "5"), ("$5", "$5", "5", "6"), ("(1, 2)", "(1, 2)", "(1,2)", "(2,1)"),
])
def test_a_gold_is_normalised_once_at_load(gold, shown, right, wrong):
    problem = as_problem(dict(question="?", answer=gold), "fixture")
    assert problem.answer == shown == normal_gold(shown)
    assert judged(problem.answer, rf"\boxed{{{problem.answer}}}") and not judged(problem.answer, rf"\boxed{{{wrong}}}")
    if "for all" not in gold:
        assert judged(problem.answer, rf"\boxed{{{right}}}")


def test_golds_that_only_the_same_text_answers_are_told():
    assert [reading(gold) for gold in ("5", r"\frac12", "Tuesday", r"\forall x \exists y", "x>3")] == ["value", "value", "words", "text", "value"]
    problems = [as_problem(dict(question=f"{i}?", answer=gold), "fixture") for i, gold in enumerate(["5", r"\forall x", "odd"])]
    [note] = maths.notes(problems)
    assert note.startswith("1 of 3 reference answers") and problems[1].id in note and maths.notes(problems[:1]) == []


@pytest.mark.parametrize("gold", ["", r"\boxed{}", "$ $", "9" * 3000])
def test_a_gold_that_says_nothing_is_bad(gold):
    with pytest.raises(BadProblem, match="the reference answer"):
        compare(gold, r"\boxed{1}")


# --------------------------------------------------------------------------------------------------
# boxes and thoughts
# --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, boxed", [
    (r"\boxed{1} and \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed {x}", "x"), (r"\boxed{}", ""), (r"\boxed{1} then \boxed{2", None),
    (r"\boxed{\{1\}}", r"\{1\}"), (r"\boxed{\boxed{3}}", r"\boxed{3}"), (r"} \boxed{a} {", "a"), ("no box", None), (r"\boxed 5", "5"), (r"\\boxed{4}", None),
])
def test_the_last_box_is_found_and_an_unfinished_one_is_none(text, boxed):
    assert last_boxed(text) == boxed


@given(st.lists(st.sampled_from([r"\boxed{", "{", "}", "a", "\\", r"\{", " ", "1"])).map("".join))
def test_boxes_are_what_a_count_of_braces_finds(text):
    """Against a search that counts braces one by one."""
    found, i = [], 0
    while i < len(text):
        if text.startswith("\\boxed{", i) and text[:i][-1:] != "\\":
            depth, end = 1, i + 7
            while end < len(text) and depth:
                skip = text[end] == "\\"
                depth += 0 if skip else (text[end] == "{") - (text[end] == "}")
                end += 1 + skip
            if depth:
                found = None
                break
            found.append(text[i + 7 : end - 1])
            i = end
        else:
            i += 1
    if "\\\\" not in text:  # \\boxed after another backslash is a new line and a box
        assert [box.content for box in boxes(text)] == (found or [])


@pytest.mark.parametrize("opened, closed", THOUGHTS)
def test_a_cut_off_thought_leaves_no_answer_in_any_family(opened, closed):
    assert final_part(f"{opened}so \\boxed{{5}}") == ""
    assert compare("5", final_part(f"{opened}\\boxed{{6}}{closed}\\boxed{{5}} and so on"))[1]
    assert final_part(f"{opened}a{closed}b {closed} c").strip() == "c"
