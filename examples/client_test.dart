// Compares timeline.dart with the traces that Python writes: the same texts and commit points, ends of words to 0.25 s.
//
//   dart examples/client_test.dart
import 'dart:convert';
import 'dart:io';
import 'dart:math';
import 'dart:typed_data';

import 'timeline.dart';

const without = ['between', 'blanks']; // this timeline commits elsewhere between words, and does not find blanks
int seed = 1;

/// Noise of whole numbers, as tests/test_traces.py makes it.
Int16List noise(List<dynamic> runs) {
  final samples = <int>[];
  for (final run in runs) {
    final count = 16 * (run[0] as int), amplitude = run[1] as int;
    for (var i = 0; i < count; i++) {
      seed = (75 * seed + 74) % 65537;
      samples.add(seed * (2 * amplitude + 1) ~/ 65537 - amplitude);
    }
  }
  return Int16List.fromList(samples);
}

/// What is wrong with this trace, or null.
String? replay(List<dynamic> steps) {
  final timeline = Timeline(), words = <Word>[], wanted = <List<dynamic>>[];
  seed = 1;
  for (final step in steps) {
    final act = step['do'] as Map<String, dynamic>, then = step['then'] as Map<String, dynamic>;
    if (act.containsKey('session')) timeline.begin();
    if (act.containsKey('audio')) timeline.addAudio(noise(act['audio'] as List<dynamic>));
    for (final text in (act['deltas'] as List<dynamic>?) ?? <dynamic>[]) {
      final deltas = text is int ? List<String>.filled(text, '') : [text as String];
      for (final delta in deltas) {
        words.addAll(timeline.addDelta(delta));
      }
    }
    if (act case {'drop': final int keep}) words.addAll(timeline.commit(timeline.received - keep));
    if (act.containsKey('final')) words.addAll(timeline.commit(max(timeline.transcribed, timeline.received)));
    for (final word in then['words'] as List<dynamic>) {
      wanted.add(word as List<dynamic>);
    }
    final got = [timeline.committed, timeline.received, timeline.transcribed];
    final right = [then['committed'], then['received'], then['transcribed']];
    if ('$got' != '$right') return '${jsonEncode(act)}: committed, received, transcribed are $got, not $right';
  }
  final texts = words.map((word) => word.text).join('|'), right = wanted.map((word) => word[0]).join('|');
  if (texts != right) return 'words are $texts, not $right';
  for (var i = 0; i < words.length; i++) {
    final end = (wanted[i][2] as num).toDouble();
    if ((words[i].end - end).abs() > 0.25) return '${words[i].text} ends at ${words[i].end} s, not $end';
  }
  return null;
}

void main() {
  final file = File.fromUri(Platform.script.resolve('../tests/traces.json'));
  final traces = jsonDecode(file.readAsStringSync())['timelines'] as Map<String, dynamic>;
  var failed = 0, passed = 0;
  traces.forEach((name, steps) {
    final acts = (steps as List<dynamic>).expand((step) => (step['do'] as Map<String, dynamic>).keys);
    if (acts.any(without.contains)) return;
    final wrong = replay(steps);
    if (wrong == null) {
      passed += 1;
    } else {
      failed += 1;
      stderr.writeln('$name: $wrong');
    }
  });
  stdout.writeln('$passed passed, $failed failed');
  exit(failed > 0 || passed == 0 ? 1 : 0);
}
