import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.concurrent.atomic.AtomicLong;
import org.apache.rocketmq.client.consumer.DefaultLitePullConsumer;
import org.apache.rocketmq.client.exception.MQClientException;
import org.apache.rocketmq.client.producer.DefaultMQProducer;
import org.apache.rocketmq.client.producer.SendStatus;
import org.apache.rocketmq.common.consumer.ConsumeFromWhere;
import org.apache.rocketmq.common.message.Message;

/** RocketMQ's own client at work: `RocketLoad SERVERS TOPIC BYTES RECORDS batches|singles|reads|latency`. Prints one number. */
public class RocketLoad {
    static final int BATCH = 500;

    public static void main(String[] args) {
        try {
            work(args);
            System.exit(0);
        } catch (Throwable e) {
            e.printStackTrace(); // the client's own threads go on
            System.exit(1);
        }
    }

    static void work(String[] args) throws Exception {
        String servers = args[0], topic = args[1], mode = args[4];
        int bytes = Integer.parseInt(args[2]);
        long records = Long.parseLong(args[3]);
        byte[] value = new byte[bytes];
        Arrays.fill(value, (byte) 'x');
        if (mode.equals("reads")) {
            read(servers, topic, records);
            return;
        }
        DefaultMQProducer producer = new DefaultMQProducer("load");
        producer.setNamesrvAddr(servers);
        producer.setDefaultTopicQueueNums(6);
        producer.setSendMsgTimeout(30_000);
        producer.start();
        makeTopic(producer, new Message(topic, value));
        if (mode.equals("latency")) {
            long[] took = new long[(int) records];
            for (int i = -1_000; i < records; i++) {
                long begun = System.nanoTime();
                send(producer, new Message(topic, value));
                if (i >= 0) took[i] = System.nanoTime() - begun;
            }
            Arrays.sort(took);
            System.out.println("result " + took[took.length / 2] / 1_000.0);
            return;
        }
        boolean batches = mode.equals("batches");
        run(producer, topic, value, records / 10, batches); // what is just in time is compiled by then
        System.out.println("result " + run(producer, topic, value, records, batches));
    }

    /** The first message makes its topic, once the broker has told the name server of itself. */
    static void makeTopic(DefaultMQProducer producer, Message message) throws Exception {
        for (int left = 30; ; left--) {
            try {
                send(producer, message);
                return;
            } catch (MQClientException e) {
                if (left == 0) throw e;
                Thread.sleep(1_000);
            }
        }
    }

    static void send(DefaultMQProducer producer, Message message) throws Exception {
        if (producer.send(message).getSendStatus() != SendStatus.SEND_OK) throw new IllegalStateException("not stored");
    }

    static double run(DefaultMQProducer producer, String topic, byte[] value, long records, boolean batches) throws Exception {
        AtomicLong left = new AtomicLong(records);
        List<Thread> threads = new ArrayList<>();
        long begun = System.nanoTime();
        for (int i = 0; i < (batches ? 4 : 32); i++) {
            Thread thread = new Thread(() -> {
                try {
                    while (left.getAndAdd(batches ? -BATCH : -1) > 0) {
                        if (batches) {
                            List<Message> list = new ArrayList<>(BATCH);
                            for (int at = 0; at < BATCH; at++) list.add(new Message(topic, value));
                            if (producer.send(list).getSendStatus() != SendStatus.SEND_OK) throw new IllegalStateException("not stored");
                        } else {
                            send(producer, new Message(topic, value));
                        }
                    }
                } catch (Exception e) {
                    e.printStackTrace();
                    System.exit(1);
                }
            });
            thread.start();
            threads.add(thread);
        }
        for (Thread thread : threads) thread.join();
        return records * 1e9 / (System.nanoTime() - begun);
    }

    static void read(String servers, String topic, long records) throws Exception {
        DefaultLitePullConsumer consumer = new DefaultLitePullConsumer("read-" + System.nanoTime());
        consumer.setNamesrvAddr(servers);
        consumer.setConsumeFromWhere(ConsumeFromWhere.CONSUME_FROM_FIRST_OFFSET);
        consumer.setPullBatchSize(1_024);
        consumer.subscribe(topic, "*");
        consumer.start();
        long got = consumer.poll(30_000).size();
        long begun = System.nanoTime(), before = got;
        while (got < records) {
            int some = consumer.poll(10_000).size();
            if (some == 0) throw new IllegalStateException(got + " of " + records);
            got += some;
        }
        System.out.println("result " + (got - before) * 1e9 / (System.nanoTime() - begun));
    }
}
