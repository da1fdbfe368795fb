// Runs the Dart client as an app would: dart drive.dart, jobs as tests/clients.py describes them.
import 'dart:convert';
import 'dart:io';
import 'dart:typed_data';

import '../examples/client.dart';

Duration seconds(num? given, int usual) => Duration(milliseconds: (1000 * (given ?? usual)).round());

Future<Map<String, Object>> run(dynamic job) async {
  final text = StringBuffer(), told = <String>[], states = <String>[];
  final client = Transcription(Uri.parse(job['url'] as String),
      key: job['key'] as String?,
      giveUp: seconds(job['giveUp'] as num?, 120),
      stall: seconds(job['stall'] as num?, 20),
      answer: seconds(job['answer'] as num?, 10),
      onWord: (word) => text.write(word.text),
      onState: (state, message) {
        states.add(state);
        if (message.isNotEmpty) told.add(message);
      });
  final samples = Int16List.sublistView(File(job['path'] as String).readAsBytesSync());
  for (var at = 0; at < samples.length; at += 1600) {
    await client.room();
    client.add(samples.sublist(at, at + 1600 < samples.length ? at + 1600 : samples.length));
  }
  await Future<void>.delayed(const Duration(milliseconds: 100)); // an app may look at `finished` later
  client.end();
  var end = 'done', message = '';
  try {
    await client.finished;
  } on Refused catch (error) {
    (end, message) = ('refused', '$error');
  } on SessionLost catch (error) {
    (end, message) = ('gave up', '$error');
  }
  return {'text': '$text', 'told': told, 'states': states, 'end': end, 'message': message};
}

Future<void> main() async {
  final jobs = jsonDecode(await utf8.decodeStream(stdin)) as List<dynamic>;
  stdout.writeln(jsonEncode(await Future.wait(jobs.map(run))));
  exit(0);
}
